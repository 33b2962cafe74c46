"""How much memory this machine has to give, and whether all parts of a bundle fit into it together."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.filesize import decimal

from deploy.bundle import Bundle, Variant
from profiles.schema import PROCESSOR_RUNTIMES

__all__ = [
    "DECODING_BYTES",
    "TILE",
    "Keep",
    "Placement",
    "available_bytes",
    "choose_keep",
    "give_back",
    "loaded_bytes",
    "place_on_gpu",
    "total_bytes",
]

Keep = Literal["all", "one"]
"""Which parts stay loaded: all of them, or the one that runs."""

_BYTES_PER_FILE_BYTE = 2
"""Weights stored in float16 are float32 once they are loaded; of others, half is left to compute in."""

TILE = 128
"""Latents along a side that are decoded at a time: 1024 pixels, which the decoders were trained on."""
DECODING_BYTES = {TILE // 2: 3_000_000_000, TILE: 10_000_000_000}
"""By latents along a side, what onnxruntime takes of a GPU to decode them for Stable Diffusion 3.5 or FLUX.1,
whose decoders are alike; measured on an H100 (benchmarks/gpu_speed.py)."""
_COMPUTING_BYTES = 2_000_000_000
"""What a transformer takes of it beyond its weights; there, too: 1.3 and 2.1 GB."""

_MADV_PAGEOUT = 21

_CGROUPS = (
    # Of a limit, of what counts towards it, and of files among that, which the system drops when it has to.
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What runs on the GPU beside the transformer."""

    on_gpu: frozenset[str] = frozenset()
    """Components of the bundle."""
    keep: Keep = "all"
    """Which parts stay loaded, as far as the GPU's memory decides it."""
    tile: int = TILE
    """Latents along a side that are decoded at a time."""
    reason: str = ""


def place_on_gpu(bundle: Bundle, free: int | None) -> Placement:
    """Choose which parts run on the GPU beside the transformer, the decoder first, and say why.

    To open a transformer takes longer than to encode a prompt on the processor, so that it stays loaded where
    the decoder fits beside it.

    Args:
        free: Bytes of the GPU's memory; None, where it does not say, is enough for small tiles.
    """
    small = TILE // 2
    names = [name for name in bundle.manifest.graphs if name != "transformer"]
    sizes = {name: _BYTES_PER_FILE_BYTE * _bytes_of(bundle, [name]) for name in names}
    sizes["transformer"] = _bytes_of(bundle, ["transformer"]) + _COMPUTING_BYTES
    everything = "text encoders and decoder: on the GPU, too"
    if free is None:
        return Placement(on_gpu=frozenset(names), tile=small, reason=f"{everything}, which says no memory")
    for parts, tile, what in (
        (names, TILE, everything),
        (names, small, everything),
        (["vae_decoder"], small, "decoder: on the GPU, too; text encoders: on the processor"),
    ):
        needed = DECODING_BYTES[tile] + sum(sizes[name] for name in ["transformer", *parts])
        if needed <= free:
            reason = f"{what}: they take {decimal(needed)} of its memory, and {decimal(free)} are free"
            return Placement(on_gpu=frozenset(parts), tile=tile, reason=reason)
    sizes["vae_decoder"] += DECODING_BYTES[small]
    largest = max(sizes.values())
    because = f"the largest takes {decimal(largest)} of its memory, and {decimal(free)} are free"
    if largest <= free:
        reason = f"{everything}, one part at a time: {because}"
        return Placement(on_gpu=frozenset(names), keep="one", tile=small, reason=reason)
    return Placement(reason=f"text encoders and decoder: on the processor, not on the GPU: {because}")


def choose_keep(
    bundle: Bundle, variant: Variant, available: int | None, on_gpu: Collection[str] = ()
) -> tuple[Keep, str]:
    """Choose which parts stay loaded, as far as the machine's own memory decides it, and say why.

    Args:
        available: Bytes of memory; None, where the system does not say, keeps all.
        on_gpu: Components that are in the GPU's memory.
    """
    if available is None:
        return "all", "all parts stay loaded: the system does not say how much memory it has"
    needed = _BYTES_PER_FILE_BYTE * loaded_bytes(bundle, variant, on_gpu)
    keep: Keep = "all" if needed <= available else "one"
    what = "all parts stay loaded" if keep == "all" else "parts are loaded one at a time"
    sizes = f"together they take {decimal(needed)}, and {decimal(available)} of memory are available"
    return keep, f"{what}: {sizes}"


def loaded_bytes(bundle: Bundle, variant: Variant, on_gpu: Collection[str] = ()) -> int:
    """Return the bytes of the files that are read into the machine's memory, weights and graphs.

    Args:
        on_gpu: Components that are in the GPU's memory, beside the transformer if the variant runs there.
    """
    gone = {*on_gpu, *(() if variant.runtime in PROCESSOR_RUNTIMES else ("transformer",))}
    return _bytes_of(bundle, [name for name in bundle.manifest.graphs if name not in gone])


def _bytes_of(bundle: Bundle, components: Iterable[str]) -> int:
    # The weights lie beside the graph, in one file for all graphs of a component.
    paths = [bundle.manifest.graphs[name][0].path for name in components]
    directories = {path.rpartition("/")[0] for path in paths}
    files = bundle.manifest.files.items()
    return sum(file.bytes for path, file in files if path.rpartition("/")[0] in directories)


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return the bytes of memory that a process may still take here; None where the system does not say.

    Args:
        root: Directory that `proc` and `sys` lie in.
    """
    try:
        sizes = [1024 * _fields(root / "proc/meminfo")["MemAvailable:"]]
    except (OSError, KeyError, ValueError):
        return None
    for limit, usage, cache in _CGROUPS:
        cgroup = root / "sys/fs/cgroup"
        try:  # a container's own limits; outside of one there are none, or they say "max"
            unused = int((cgroup / limit).read_text()) - int((cgroup / usage).read_text())
            sizes.append(unused + _fields((cgroup / limit).with_name("memory.stat"))[cache])
        except (OSError, KeyError, ValueError):
            continue
    return max(0, min(sizes))


def total_bytes(root: Path = Path("/")) -> int | None:
    """Return the bytes of memory that all processes may take here together, as `available_bytes`."""
    try:
        sizes = [1024 * _fields(root / "proc/meminfo")["MemTotal:"]]
    except (OSError, KeyError, ValueError):
        return None
    for limit, *_ in _CGROUPS:
        try:
            sizes.append(int((root / "sys/fs/cgroup" / limit).read_text()))
        except (OSError, ValueError):
            continue
    return min(sizes)


def give_back(directory: Path | None = None) -> None:
    """Return memory to the system that this process does not use now; elsewhere than on Linux, do nothing.

    Args:
        directory: Pages of files in it that are mapped into memory go as well, until they are read again.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc keeps what was freed in pieces below 32 MB
        libc.malloc_trim(0)
    if directory is None:
        return
    directory = directory.resolve()  # as the system names what is mapped, whatever a user typed
    with Path("/proc/self/maps").open(encoding="utf-8") as lines:
        ranges = [line.split(maxsplit=5) for line in lines]
    for addresses, *_, path in (fields for fields in ranges if len(fields) == 6):
        if Path(path.strip()).is_relative_to(directory):
            start, stop = (int(address, 16) for address in addresses.split("-"))
            # It fails before Linux 5.4, and then the pages stay until the system wants them.
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _MADV_PAGEOUT)


def _fields(path: Path) -> dict[str, int]:
    return {name: int(value) for name, value, *_ in map(str.split, path.read_text().splitlines())}
