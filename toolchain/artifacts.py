"""How artefacts reach the disk and come back: whole or not at all, and checked."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from toolchain.errors import ToolchainError

try:
    import fcntl
except ImportError:  # Windows, where what a killed process left stays
    fcntl = None  # type: ignore[assignment]

_PART = ".part"
"""Ends the names of what is being written."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Make a directory appear at once: yields a hidden sibling that is renamed to `path` on success.

    On any error the sibling is removed and `path` is as it was; one that a killed process left is removed by
    the next that writes `path`.

    Raises:
        ToolchainError: `path` holds something already, its parent cannot be written, or its disk gets full.
    """
    check_new_directory(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_PART, dir=path.parent))
    except OSError as error:
        raise ToolchainError(f"cannot write {path}: {error.strerror}; choose another --output") from error
    try:
        with _held(beside, wait=True):
            beside.chmod(0o755)  # mkdtemp makes it private
            yield beside
            beside.replace(path)
    except Exception as error:
        if is_full(error):
            raise ToolchainError(
                f"cannot write {path}: its disk is full ({error}); make room, or write to another (--output, "
                "and HPTOOL_CACHE for what is kept), and give the same command again"
            ) from error
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def is_full(error: Exception) -> bool:
    """Whether a write failed for want of room; safetensors says so in words alone."""
    found = (getattr(error, "errno", None), *(code for code in _FULL if f"(os error {code})" in str(error)))
    return not _FULL.isdisjoint(found)


def check_new_directory(path: Path) -> None:
    """Refuse, before any work is done, an output directory that could not be written at its end.

    What a process that was killed had written of it is removed, so that it does not count as used space.

    Raises:
        ToolchainError: `path` holds something already, or no directory above it can be written.
    """
    if path.is_dir() and any(path.iterdir()):
        raise ToolchainError(f"output {path} is not empty; choose another --output or remove it first")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ToolchainError(f"output {path} is a file or a link; choose another --output or remove it first")
    if path.resolve() == Path.cwd():
        raise ToolchainError(f"output {path} is the directory you are in; name a new one in it with --output")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    try:
        Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=parent)).rmdir()
    except OSError as error:
        raise ToolchainError(
            f"cannot write {path}: {parent}: {error.strerror}; choose another --output"
        ) from error
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'?' * 8}{_PART}"):
        with _held(left, wait=False) as held, suppress(OSError):
            if held and any(left.iterdir()):  # an empty one may have been made just now
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _held(directory: Path, *, wait: bool) -> Iterator[bool]:
    """Lock a directory, for no longer than this process lives; yields whether that could be done."""
    descriptor, held = None, False
    with suppress(OSError):  # another has it, it is gone or none, or its file system knows no locks
        if fcntl is not None:
            descriptor = os.open(directory, os.O_DIRECTORY | os.O_NOFOLLOW)
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
    try:
        yield held
    finally:
        if descriptor is not None:
            os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, beside and renamed."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, beside and renamed."""
    beside = path.with_name(f".{path.name}{_PART}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ToolchainError: The file is missing, is no JSON, or is not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ToolchainError(f"{path} does not exist") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ToolchainError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ToolchainError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
