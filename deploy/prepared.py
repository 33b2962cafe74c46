"""Graphs as onnxruntime wants them on this processor, kept in files that are mapped into memory.

onnxruntime rearranges weights for the processor when it opens a graph, which takes longer than to read them,
and holds both forms in memory. Written once with the rearranged ones, the graph opens in a fraction of that
time, and what is resident of it are the pages of one form, which the system can drop.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.filesize import decimal

from deploy.errors import DeployError

__all__ = ["MINIMUM_BYTES", "WEIGHTS", "cache_directory", "prepared_graph", "processor"]

MINIMUM_BYTES = 64 << 20
"""Of weights, below which a graph is opened as it is: it takes no time worth the disk."""
WEIGHTS = "weights.data"

_DISK_SHARE = 4
"""Disk by bytes of weights: both forms are written, and 16-bit ones as 32."""
_UNUSED_SECONDS = 30 * 24 * 3600
_STALE_SECONDS = 3600

logger = logging.getLogger(__name__)


def cache_directory() -> Path:
    """`$HPTOOL_CACHE`, or the user's directory for such things."""
    if chosen := os.environ.get("HPTOOL_CACHE"):
        return Path(chosen)
    base = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hptool"


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
    key = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()
    entry = cache / "prepared" / key
    found = entry / graph.name
    if found.exists():
        os.utime(entry)
        return found
    try:
        _write(graph, entry, num_bytes, write)
    except (OSError, DeployError) as error:  # onnxruntime's own, if the disk gets full while it writes
        logger.warning(
            "%s is opened as it is, which takes longer and more memory: nothing can be kept in %s (%s)",
            graph,
            entry.parent,
            error,
        )
        return None
    return found


def processor() -> str:
    """Return the instructions that this processor has, which the form of the weights depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    known = (line for line in lines if line.startswith(("flags", "Features")))
    return next(known, f"{platform.machine()} {platform.processor()}")


def _write(graph: Path, entry: Path, num_bytes: int, write: Callable[[Path], None]) -> None:
    entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _forget_unused(entry.parent)
    free = shutil.disk_usage(entry.parent).free
    if free < _DISK_SHARE * num_bytes:
        raise OSError(f"{decimal(_DISK_SHARE * num_bytes)} may be needed, and {decimal(free)} are free")
    logger.info("preparing %s for this processor, once; it is kept in %s", graph, entry)
    temporary = Path(tempfile.mkdtemp(dir=entry.parent, prefix=f".{entry.name[:16]}."))
    try:
        write(temporary / graph.name)
        for path in temporary.iterdir():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())  # a device may lose power: the name must not last longer than this
        temporary.rename(entry)
    except OSError:
        if not entry.exists():  # another process may have been faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _forget_unused(directory: Path) -> None:
    """Remove what no session was opened from for a month, and what a process that was killed left behind."""
    for path in directory.iterdir():
        unused = time.time() - path.stat().st_mtime
        if unused > (_STALE_SECONDS if path.name.startswith(".") else _UNUSED_SECONDS):
            shutil.rmtree(path, ignore_errors=True)
