"""How much memory this machine has to give, and whether all parts of a bundle fit into it together."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from rich.filesize import decimal

from deploy.bundle import Bundle, Variant
from profiles.schema import PROCESSOR_RUNTIMES

__all__ = [
    "DECODING_BYTES",
    "TILE",
    "Keep",
    "available_bytes",
    "choose_keep",
    "choose_tile",
    "give_back",
    "loaded_bytes",
    "others_bytes",
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

_MADV_PAGEOUT = 21

_CGROUPS = (
    # Of a limit, of what counts towards it, and of files among that, which the system drops when it has to.
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)


def choose_keep(
    bundle: Bundle, variant: Variant, available: int | None, *, on_gpu: bool = False
) -> tuple[Keep, str]:
    """Choose which parts stay loaded, and say why.

    Args:
        available: Bytes of memory, the GPU's where all parts are there; None, where the system does not say,
            keeps all.
        on_gpu: Whether all parts run on the GPU.
    """
    if available is None:
        return "all", "all parts stay loaded: the system does not say how much memory it has"
    needed = _BYTES_PER_FILE_BYTE * loaded_bytes(bundle, variant, on_gpu=on_gpu)
    if on_gpu:
        needed += DECODING_BYTES[TILE // 2]
    keep: Keep = "all" if needed <= available else "one"
    what = "all parts stay loaded" if keep == "all" else "parts are loaded one at a time"
    whose = "of the GPU's memory" if on_gpu else "of memory"
    sizes = f"together they take {decimal(needed)}, and {decimal(available)} {whose} are available"
    return keep, f"{what}: {sizes}"


def choose_tile(bundle: Bundle, variant: Variant, available: int | None) -> int:
    """Choose how many latents along a side a GPU decodes at a time.

    Args:
        available: Bytes of the GPU's memory; None, where it does not say, is little.
    """
    rest = (available or 0) - _BYTES_PER_FILE_BYTE * loaded_bytes(bundle, variant, on_gpu=True)
    return TILE if rest >= DECODING_BYTES[TILE] else TILE // 2


def others_bytes(bundle: Bundle) -> int:
    """Return the bytes of a GPU's memory that the largest of the parts beside the transformer takes."""
    needed = {
        name: _BYTES_PER_FILE_BYTE * _bytes_of(bundle, [name])
        for name in bundle.manifest.graphs
        if name != "transformer"
    }
    needed["vae_decoder"] += DECODING_BYTES[TILE // 2]
    return max(needed.values())


def loaded_bytes(bundle: Bundle, variant: Variant, *, on_gpu: bool = False) -> int:
    """Return the bytes of the files that are read into the machine's memory, weights and graphs.

    Args:
        on_gpu: Whether all parts are on the GPU, whose memory it is then.
    """
    # Where the other parts are not on the GPU, the transformer's weights alone may be.
    whole = on_gpu or variant.runtime in PROCESSOR_RUNTIMES
    return _bytes_of(bundle, [name for name in bundle.manifest.graphs if whole or name != "transformer"])


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
