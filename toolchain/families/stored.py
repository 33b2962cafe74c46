"""The tensors of a checkpoint, read one at a time: what a part of billions of parameters is exported from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from toolchain.artifacts import read_json
from toolchain.errors import ToolchainError
from toolchain.families.names import superfluous

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["StoredTensors", "require_same_names", "weight_files"]

_FLOATS = ("F64", "F32", "F16", "BF16")


class StoredTensors(Mapping[str, "torch.Tensor"]):
    """Tensors by the names a module has for them, each read when it is asked for and kept by nobody.

    Args:
        source: What the user calls the model, for errors.
        part: Directory of the part, with its safetensors.
        module: Whose tensors they are; it may lie on the meta device.
        names: By the module's name of a tensor, the names that files may have for it; its own if left out.

    Raises:
        ToolchainError: A tensor is missing, has no place in the module, another shape or another type, or a
            file is damaged.
    """

    def __init__(
        self,
        source: str,
        part: Path,
        module: nn.Module,
        names: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        shapes: dict[str, tuple[int, ...]] = {}
        types: dict[str, str] = {}
        files: dict[str, Path] = {}
        for file in weight_files(part):
            try:
                with safe_open(file, framework="pt") as stored:
                    for name in stored.keys():  # noqa: SIM118 - it is no mapping
                        tensor = stored.get_slice(name)
                        files[name], shapes[name] = file, tuple(tensor.get_shape())
                        types[name] = tensor.get_dtype()
            except (SafetensorError, OSError) as error:
                raise ToolchainError(
                    f"{file} cannot be read: {error}. Download or save {source} again."
                ) from error
        self._places: dict[str, tuple[Path, str]] = {}
        expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        floating = {name: tensor.is_floating_point() for name, tensor in module.state_dict().items()}
        for name in expected:
            if found := next((other for other in (names or {}).get(name, (name,)) if other in files), None):
                self._places[name] = (files[found], found)
        known = {other for name in self._places for other in (names or {}).get(name, (name,))}
        unknown = {name for name in files.keys() - known if not superfluous(name)}
        require_same_names(source, part.name, expected.keys() - self._places.keys(), unknown)
        for name, (_, found) in self._places.items():
            if shapes[found] != expected[name]:
                raise ToolchainError(
                    f"{source} holds {found} of its {part.name} as {list(shapes[found])}, where its "
                    f"config.json makes it {list(expected[name])}; one of the two is of another model"
                )
            if floating[name] and types[found] not in _FLOATS:
                raise ToolchainError(
                    f"{source} holds {found} of its {part.name} as {types[found]}, and weights are read as "
                    f"{', '.join(_FLOATS)}; take the model as it was published, before it was quantised"
                )

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read a tensor in the type it is stored in."""
        file, found = self._places[name]
        # Opened each time: while a file is open it stays mapped, and its pages count as this process's.
        with safe_open(file, framework="pt") as stored:
            tensor: torch.Tensor = stored.get_tensor(found)
        return tensor

    def __contains__(self, name: object) -> bool:
        """Whether it is one of the module's tensors; nothing is read to tell."""
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        """In the order of the module's tensors."""
        return iter(self._places)

    def __len__(self) -> int:
        """Of the module's tensors."""
        return len(self._places)


def weight_files(part: Path) -> list[Path]:
    """The safetensors of a part, in shards or whole; other variants beside them do not count.

    Raises:
        ToolchainError: There are none, or one of the shards is missing.
    """
    for stem in ("diffusion_pytorch_model", "model"):
        shards = part / f"{stem}.safetensors.index.json"
        if shards.exists():
            files = sorted({part / Path(name).name for name in read_json(shards)["weight_map"].values()})
            if missing := [file.name for file in files if not file.exists()]:
                raise ToolchainError(f"{part} lacks {', '.join(missing)}, which {shards.name} lists")
            return files
        if (part / f"{stem}.safetensors").exists():
            return [part / f"{stem}.safetensors"]
    raise ToolchainError(f"{part} holds no weights as safetensors")


def require_same_names(source: str, part: str, missing: Iterable[str], unknown: Iterable[str]) -> None:
    """Refuse a part with too few or too many tensors.

    Raises:
        ToolchainError: It is one.
    """
    if names := sorted(missing):
        raise ToolchainError(f"{source} lacks weights of its {part}: {', '.join(names[:5])}")
    if names := sorted(unknown):
        raise ToolchainError(
            f"{source} holds weights its {part} has no place for: {', '.join(names[:5])}; "
            "its config.json is that of another model"
        )
