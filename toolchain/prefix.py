"""Room for distillation: what has done its part leaves memory, and what was computed once is kept on disk."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from toolchain.errors import ToolchainError
from toolchain.families.mmdit import Streams
from toolchain.processes import processes
from toolchain.tensorfile import tensor_bytes, write_header

_Key = tuple[int, torch.Size]


class Resting:
    """Weights that can leave memory, and device, for a file, and come back as they were.

    While they rest they are mapped from the file: they take no memory, and still can be read. On the CPU they
    are used from there, page by page, and the system drops pages when it needs the room.

    Args:
        tensors: Frozen parameters, and buffers; several may share one storage, and go on doing so.
        directory: Where the file lies. It has no name there, so nothing is left of it when the process ends,
            however it does.
        device: Where they are wanted between rests.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], directory: Path, device: torch.device) -> None:
        self._wanted_on = device
        # By the tensors as objects, which stay while their storage changes.
        self._keys = {item: storage_key(item) for item in tensors}
        self._home = {key: item.device for item, key in self._keys.items()}
        weights = {str(key): item.detach().contiguous() for item, key in self._keys.items()}
        directory.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(prefix=".resting.", dir=directory) as name:
                file = Path(name) / "weights.safetensors"
                save_file(weights, file)
                mapped = load_file(file)
        except (OSError, SafetensorError) as error:
            needed = sum(item.nbytes for item in weights.values())
            raise ToolchainError(
                f"the weights that are to rest, {needed / 1e9:.2f} GB, do not go into {directory}: {error}"
            ) from error
        self._mapped = {key: mapped[str(key)] for key in self._home}
        self._put(self._mapped)

    @contextmanager
    def awake(self, tensors: Iterable[torch.Tensor]) -> Iterator[None]:
        """Have some of them on the device; those that never rested are where they are.

        On the CPU that takes no memory: they are used from the file.
        """
        keys = {self._keys[item] for item in tensors if item in self._keys}
        self._put({key: self._mapped[key].to(self._wanted_on) for key in keys})
        try:
            yield
        finally:
            self._put({key: self._mapped[key] for key in keys})

    def go_home(self) -> None:
        """Be again in the memory they came from."""
        self._put({key: item.to(self._home[key], copy=True) for key, item in self._mapped.items()})

    def _put(self, values: dict[_Key, torch.Tensor]) -> None:
        for item, key in self._keys.items():
            if key in values:
                item.data = values[key]


@contextmanager
def lent(*what: nn.Module | torch.Tensor) -> Iterator[None]:
    """Have weights and buffers where this process computes, for a while; what is one in memory is one there.

    At the end they are where they were, with what they learned.
    """
    given = (tensors_of(item) if isinstance(item, nn.Module) else [item] for item in what)
    homes = {item: item.data for items in given for item in items}
    device, arrived = processes().device, dict[_Key, torch.Tensor]()
    for item in homes:
        key = storage_key(item)
        if key not in arrived:
            arrived[key] = item.data.to(device)
        item.data = arrived[key]
    try:
        yield
    finally:
        for item, home in homes.items():
            if item.requires_grad and item.data_ptr() != home.data_ptr():
                home.copy_(item.data)
            item.data = home


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """Its weights and buffers."""
    return [*module.parameters(), *module.buffers()]


def storage_key(tensor: torch.Tensor) -> _Key:
    """The same for tensors that are one in memory."""
    return tensor.data_ptr(), tensor.shape


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """Of the content of tensors in their order."""
    total = hashlib.sha256()
    for item in tensors:
        total.update(f"{item.dtype}{tuple(item.shape)}".encode())
        total.update(tensor_bytes(item))
    return total.hexdigest()


@dataclass(frozen=True, kw_only=True)
class StreamCache:
    """What a prefix gives for every state, in one memory-mapped safetensors file."""

    rows: dict[str, torch.Tensor]
    """By field of `Streams`; the first axis is that of the states."""
    constants: dict[str, torch.Tensor]
    """What does not depend on the state."""
    dtypes: dict[str, torch.dtype]
    """As the prefix gave them, to which they are cast again."""
    size: tuple[int, int]

    def streams(self, rows: torch.Tensor, device: torch.device) -> Streams:
        """Those of some states; nothing else is read from the disk."""
        values = {name: item[rows].to(device, self.dtypes[name]) for name, item in self.rows.items()}
        rotary = [self.constants[name].to(device) for name in sorted(self.constants)]
        return Streams(
            image_BND=values["image_BND"],
            text_BTD=values.get("text_BTD"),
            conditioning_BD=values["conditioning_BD"],
            rotary=(rotary[0], rotary[1]) if rotary else None,
            size=self.size,
        )


def write_stream_cache(
    path: Path,
    compute: Callable[[torch.Tensor], Streams],
    num_states: int,
    *,
    batch_size: int,
    dtype: torch.dtype,
    made_from: dict[str, str],
) -> None:
    """Compute the streams of all states and write them batch by batch, beside their place and renamed.

    Args:
        path: The file.
        compute: Streams of the states of some rows.
        num_states: How many states there are.
        batch_size: States computed at once.
        dtype: That of the streams on disk.
        made_from: What they depend on, for whoever reads them.

    Raises:
        ToolchainError: It cannot be written.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            offsets: dict[str, int] = {}
            for rows in torch.split(torch.arange(num_states), batch_size):
                streams = compute(rows)
                if not offsets:
                    offsets = _begin_file(file, streams, num_states, dtype, made_from)
                for name, item in _fields(streams):
                    item = item.to("cpu", dtype).contiguous()
                    file.seek(offsets[name] + int(rows[0]) * item[0].nbytes)
                    file.write(tensor_bytes(item))
        beside.replace(path)
    except OSError as error:
        raise ToolchainError(f"the outputs of the prefix cannot be kept in {path}: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


def read_stream_cache(path: Path, made_from: dict[str, str]) -> StreamCache:
    """Map a cache.

    Raises:
        ToolchainError: It is none, or was made from something else.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in list(stored.keys())}
            metadata = {key: json.loads(value) for key, value in stored.metadata().items()}
        before, dtypes = metadata["made_from"], metadata["dtypes"]
        height, width = metadata["size"]
    except (SafetensorError, AttributeError, KeyError, ValueError, OSError) as error:
        raise ToolchainError(
            f"{path} holds no outputs of a prefix ({error}); remove it or name another"
        ) from error
    keys = before.keys() | made_from.keys()
    if differing := sorted(key for key in keys if before.get(key) != made_from.get(key)):
        raise ToolchainError(
            f"the outputs of a prefix in {path} were made with other {', '.join(differing)} than this "
            "training's; remove it to have it made again, or name another"
        )
    return StreamCache(
        rows={name: item for name, item in tensors.items() if not name.startswith("rotary")},
        constants={name: item for name, item in tensors.items() if name.startswith("rotary")},
        dtypes={name: getattr(torch, value) for name, value in dtypes.items()},
        size=(height, width),
    )


def _fields(streams: Streams) -> Iterator[tuple[str, torch.Tensor]]:
    for name in ("image_BND", "text_BTD", "conditioning_BD"):
        if (item := getattr(streams, name)) is not None:
            yield name, item


def _begin_file(
    file: BinaryIO, streams: Streams, num_states: int, dtype: torch.dtype, made_from: dict[str, str]
) -> dict[str, int]:
    """Write the header and what does not depend on the state; the offset of each tensor that does."""
    constants = {
        f"rotary.{index}": item.cpu().contiguous() for index, item in enumerate(streams.rotary or ())
    }
    dtypes = {name: str(item.dtype).removeprefix("torch.") for name, item in _fields(streams)}
    notes = {"made_from": made_from, "dtypes": dtypes, "size": streams.size}
    shapes = {name: (num_states, *item.shape[1:]) for name, item in _fields(streams)}
    starts = write_header(
        file,
        [
            # Constants come first: they are of 32 bits.
            *((name, tuple(item.shape), item.dtype) for name, item in constants.items()),
            *((name, shape, dtype) for name, shape in shapes.items()),
        ],
        {key: json.dumps(value) for key, value in notes.items()},
    )
    for name, item in constants.items():
        file.seek(starts[name])
        file.write(tensor_bytes(item))
    return {name: starts[name] for name in shapes}


def moved(streams: Streams, device: torch.device) -> Streams:
    """Streams on a device."""
    text, rotary = streams.text_BTD, streams.rotary
    return replace(
        streams,
        image_BND=streams.image_BND.to(device),
        text_BTD=None if text is None else text.to(device),
        conditioning_BD=streams.conditioning_BD.to(device),
        rotary=None if rotary is None else (rotary[0].to(device), rotary[1].to(device)),
    )
