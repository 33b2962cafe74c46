"""Directories that are made once and kept by a digest of all they depend on, in the user's cache.

A directory appears when it is whole and on the disk, and goes when nothing used it for a month. The cache can
be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.filesize import decimal

__all__ = ["cache_directory", "kept_directory", "key_of"]

_UNUSED_SECONDS = 30 * 24 * 3600
_STALE_SECONDS = 6 * 3600


def cache_directory() -> Path:
    """`$HPTOOL_CACHE`, or the user's directory for such things."""
    if chosen := os.environ.get("HPTOOL_CACHE"):
        return Path(chosen)
    base = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hptool"


def key_of(facts: Mapping[str, Any]) -> str:
    """Return the digest of all that a directory depends on."""
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()


def kept_directory(entry: Path, write: Callable[[Path], None], *, num_bytes: int) -> Path:
    """Return a directory of the cache, written now if this is the first time.

    Args:
        entry: The directory, named by what `key_of` gives; others like it lie beside it.
        write: Writes its files, into a directory that is renamed to this one.
        num_bytes: That they may take on the disk.

    Raises:
        OSError: It cannot be kept: the disk is full, or cannot be written.
    """
    if entry.is_dir():
        os.utime(entry)
        return entry
    entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _forget_unused(entry.parent)
    free = shutil.disk_usage(entry.parent).free
    if free < num_bytes:
        raise OSError(f"{decimal(num_bytes)} may be needed, and {decimal(free)} are free")
    temporary = Path(tempfile.mkdtemp(dir=entry.parent, prefix=f".{entry.name[:16]}."))
    try:
        write(temporary)
        for path in temporary.iterdir():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())  # a device may lose power: the name must not last longer than this
        temporary.rename(entry)
    except OSError:
        if not entry.exists():  # another process may have been faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return entry


def _forget_unused(directory: Path) -> None:
    """Remove what was not used for a month, and what a process that was killed left behind."""
    for path in directory.iterdir():
        try:
            unused = time.time() - path.stat().st_mtime
        except FileNotFoundError:  # another process is done with it
            continue
        if unused > (_STALE_SECONDS if path.name.startswith(".") else _UNUSED_SECONDS):
            shutil.rmtree(path, ignore_errors=True)
