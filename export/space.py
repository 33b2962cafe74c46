"""Disk and memory that an export takes, computed before the work starts."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal
from torch import nn

from export.components import Precision, part_bits
from export.errors import ExportError
from export.quantize import choose_form
from toolchain.families import Model

__all__ = [
    "NODES_PER_BLOCK",
    "Needs",
    "export_memory_bytes",
    "require_space",
    "stored_bytes",
]

_MARGIN = 1.02
"""For graphs, tokenizers and the alignment of tensors."""
_DECODER = ("decoder.", "post_quant_conv.")
"""Where the names of the autoencoder's parameters begin that are exported."""
_T5_EMBEDDINGS = {"shared.weight", "encoder.embed_tokens.weight"}
_BASE_BYTES = 1 << 30
"""Of a process that has torch, diffusers and onnxruntime loaded and does nothing."""
NODES_PER_BLOCK = 150
"""Of a transformer's graph, at most."""
_BLOCKS_AT_ONCE = 2
"""The largest block in float32 while it is compared: its weights, and those that are on their way."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes that an export is going to take."""

    components: Mapping[str, int]
    """Of the weights of each component that is not in the cache."""
    cached: Mapping[str, int]
    """Of those that are."""
    engines: int
    """Of all engines, which the cache and the bundle hold."""
    memory: int
    """At its peak."""

    @property
    def cache_disk(self) -> int:
        """On the disk of the cache."""
        return math.ceil(_MARGIN * sum(self.components.values())) + self.engines

    @property
    def output_disk(self) -> int:
        """On the disk of the bundle."""
        return math.ceil(_MARGIN * sum((*self.components.values(), *self.cached.values()))) + self.engines


def stored_bytes(model: Model, part: str, precision: Precision) -> int:
    """Bytes of a part's weights as an export stores them, from the shapes of its parameters alone.

    Args:
        model: Its parameters may lie on the meta device.
        part: Of the pipeline: `transformer`, `vae` or a text encoder.
        precision: What it is exported in.
    """
    bits_of = part_bits(model, part, precision)
    total = 0
    for name, item in part_parameters(model, part):
        shape, linear = item.shape[::-1], item.ndim == 2
        form = choose_form(name, shape, bits_of, precision.group_size, linear=linear)
        total += form.num_bytes(item.numel())
    return total


def part_parameters(model: Model, part: str) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a part that its graph reads, by name."""
    found = dict(getattr(model.pipeline, part).named_parameters())
    if part == "vae":
        return [(name, item) for name, item in found.items() if name.startswith(_DECODER)]
    if found.keys() >= _T5_EMBEDDINGS:  # two names of one tensor, which the skeleton of a T5 does not tie
        del found["shared.weight"]
    return list(found.items())


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


def export_memory_bytes(model: Model) -> int:
    """Peak of an export before engines: the largest block, and what compares it."""
    largest = max(sum(item.numel() for item in block.parameters()) for block in model.mmdit.blocks)
    return _BASE_BYTES + 4 * _BLOCKS_AT_ONCE * largest


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
