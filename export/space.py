"""Disk and memory that an export takes, computed before the work starts."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal

from deploy.engine import build_memory_bytes
from export.components import Precision
from export.errors import ExportError
from toolchain.families import Model

__all__ = ["Needs", "expected_bytes", "require_space"]

_MARGIN = 1.02
"""For graphs, tokenizers and the alignment of tensors."""
_BASE_BYTES = 1 << 30
"""Of a process that has torch, diffusers and onnxruntime loaded and does nothing."""
_BLOCKS_AT_ONCE = 2
"""The largest block in float32 while it is compared: its weights, and those that are on their way."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes that an export is going to take."""

    components: Mapping[str, int]
    """Of the files of each component that is not in the cache."""
    cached: Mapping[str, int]
    """Of those that are."""
    engines: int
    """Of all engines, which the cache and the bundle hold."""
    memory: int
    """At its peak."""

    @property
    def cache_disk(self) -> int:
        """On the disk of the cache."""
        return sum(self.components.values()) + self.engines

    @property
    def output_disk(self) -> int:
        """On the disk of the bundle."""
        return sum((*self.components.values(), *self.cached.values())) + self.engines


def expected_bytes(model: Model, part: str, precision: Precision) -> int:
    """Bytes of a component's files, from the shapes of its tensors alone."""
    names = {id(item): name for name, item in getattr(model.pipeline, part).named_parameters()}
    blocks = {id(item) for block in model.mmdit.blocks for item in block.parameters()}
    total = 0.0
    for item in getattr(model.pipeline, part).parameters():
        plain = 4.0 if precision.bits == 32 else 2.0
        if part == "transformer" and item.ndim == 2 and id(item) in blocks and precision.bits < 16:
            plain = precision.weights.get(names[id(item)], precision.bits) / 8 + 2 / precision.group_size
        total += plain * item.numel()
    return math.ceil(_MARGIN * total)


def require_space(needs: Needs, *, output: Path, cache: Path) -> None:
    """Refuse an export that would run out of disk or memory, before it begins.

    Raises:
        ExportError: It would.
    """
    places: dict[int, tuple[Path, int]] = {}
    for path, size in ((output, needs.output_disk), (cache, needs.cache_disk)):
        there = _existing(path)
        device = there.stat().st_dev
        places[device] = (there, places.get(device, (there, 0))[1] + size)
    for there, size in places.values():
        free = shutil.disk_usage(there).free
        if size > free:
            raise ExportError(
                f"The export takes {decimal(size)} on the disk of {there}, where {decimal(free)} are free. "
                "Make room, choose another --output, or set HPTOOL_CACHE to a directory on another disk."
            )
    available = _available_memory()
    if available is not None and needs.memory > available:
        raise ExportError(
            f"The export takes {decimal(needs.memory)} of memory, and {decimal(available)} are free. Close "
            "other programs, export on a larger machine, or leave out targets that need an engine."
        )


def memory_bytes(model: Model, transformer_bytes: int, *, engine: bool) -> int:
    """Peak of an export: a block and what compares it, or building the engine."""
    largest = max(sum(item.numel() for item in block.parameters()) for block in model.mmdit.blocks)
    block = _BASE_BYTES + 4 * _BLOCKS_AT_ONCE * largest
    return max(block, _BASE_BYTES + build_memory_bytes(transformer_bytes) if engine else 0)


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _available_memory() -> int | None:
    """Bytes the system would give; None where it does not say."""
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
