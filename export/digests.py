"""Digests of checkpoints' files, each read once: ahead of the time it is needed, and then remembered."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from blake3 import blake3

from toolchain.artifacts import read_json, write_json
from toolchain.errors import ToolchainError

__all__ = ["FileDigests"]

_MEMORY = "blake3.json"
"""Nobody else reads it: BLAKE3 takes a quarter of SHA-256's time."""
_WINDOW = 1 << 26
"""Bytes digested at a time, and of a file in memory: a thread beside one that computes waits for the
interpreter after each."""


class FileDigests:
    """Remembers a file's digest for as long as its size and its time of change stay what they are.

    Args:
        directory: Where to remember them.
    """

    def __init__(self, directory: Path) -> None:
        self._memory = directory / _MEMORY
        self._lock = threading.Lock()
        self._reading: dict[str, threading.Lock] = {}

    @contextmanager
    def ahead(self, paths: Iterable[Path]) -> Iterator[None]:
        """Read files, one after another, while something else is done; what is unread at its end stays so."""
        stopped = threading.Event()

        def read() -> None:
            for path in paths:
                with suppress(OSError, ToolchainError):  # whoever needs it will tell
                    self._digest(path, stopped)

        thread = threading.Thread(target=read)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()

    def digest(self, path: Path) -> str:
        """Hex digest of a file; where another thread is reading it, that one is waited for.

        Raises:
            OSError: It cannot be read.
            ToolchainError: What is remembered cannot be.
        """
        found = self._digest(path, threading.Event())
        assert found is not None
        return found

    def remembers(self, paths: Iterable[Path]) -> bool:
        """Whether files need not be read for their digests."""
        return all(self._remembered(path) is not None for path in paths)

    def _digest(self, path: Path, stopped: threading.Event) -> str | None:
        name = str(path.resolve())
        with self._lock:
            reading = self._reading.setdefault(name, threading.Lock())
        with reading:
            if (remembered := self._remembered(path)) is not None:
                return remembered
            mark, digest = _mark(path), blake3()
            for window in _windows(path):
                if stopped.is_set():
                    return None
                digest.update(window)
            found: str = digest.hexdigest()
            with self._lock:
                self._memory.parent.mkdir(parents=True, exist_ok=True)
                write_json(self._memory, self._digests() | {name: [*mark, found]})
            return found

    def _remembered(self, path: Path) -> str | None:
        *mark, digest = self._digests().get(str(path.resolve()), [None])
        return digest if mark == _mark(path) else None

    def _digests(self) -> dict[str, Any]:
        return read_json(self._memory) if self._memory.exists() else {}


def _windows(path: Path) -> Iterator[memoryview]:
    """The parts of a file, mapped: read into a buffer they take half as much of a core again."""
    if not path.stat().st_size:  # which cannot be mapped
        return
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for start in range(0, len(mapped), _WINDOW):
            with memoryview(mapped)[start : start + _WINDOW] as window:
                yield window
            mapped.madvise(mmap.MADV_DONTNEED, start, min(_WINDOW, len(mapped) - start))


def _mark(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]
