"""Graphs as onnxruntime wants them on this processor, kept in files that are mapped into memory.

onnxruntime rearranges weights for the processor when it opens a graph, which takes longer than to read them,
and holds both forms in memory. Written once with the rearranged ones, the graph opens in a fraction of that
time, and what is resident of it are the pages of one form, which the system can drop.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Mapping
from pathlib import Path

from deploy.errors import DeployError
from deploy.kept import cache_directory, kept_directory, key_of

__all__ = ["MINIMUM_BYTES", "WEIGHTS", "cache_directory", "prepared_graph", "processor"]

MINIMUM_BYTES = 64 << 20
"""Of weights, below which a graph is opened as it is: it takes no time worth the disk."""
WEIGHTS = "weights.data"

_DISK_SHARE = 4
"""Disk by bytes of weights: both forms are written, and 16-bit ones as 32."""

logger = logging.getLogger(__name__)


def prepared_graph(
    graph: Path, facts: Mapping[str, str], num_bytes: int, write: Callable[[Path], None], cache: Path
) -> Path | None:
    """Return the prepared form of a graph, written now if this is the first time.

    Args:
        graph: As it lies in the bundle.
        facts: All that the prepared form depends on.
        num_bytes: Of the graph's weights.
        write: Writes it to a path, its weights beside it.
        cache: Where prepared graphs lie, each in a directory of its own.

    Returns:
        None where it cannot be kept: the disk is full or not writable, or the graph is none. The reason is
        logged.
    """
    entry = cache / "prepared" / key_of(facts)

    def prepare(directory: Path) -> None:
        logger.info("preparing %s for this processor, once; it is kept in %s", graph, entry)
        write(directory / graph.name)

    try:
        return kept_directory(entry, prepare, num_bytes=_DISK_SHARE * num_bytes) / graph.name
    except (OSError, DeployError) as error:  # onnxruntime's own, if the disk gets full while it writes
        logger.warning(
            "%s is opened as it is, which takes longer and more memory: nothing can be kept in %s (%s)",
            graph,
            entry.parent,
            error,
        )
        return None


def processor() -> str:
    """Return the instructions that this processor has, which the form of the weights depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    known = (line for line in lines if line.startswith(("flags", "Features")))
    return next(known, f"{platform.machine()} {platform.processor()}")
