"""A command in a process of its own: how long it takes, and how much memory it and its children hold."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL_SECONDS = 0.05
_FIELDS = ("VmRSS", "VmHWM", "RssAnon", "RssFile")
_BLOCK = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What a command took."""

    seconds: float
    peak_bytes: int
    """Resident at once, files mapped into memory included, over the command and all its children. Pages that
    several of them share count once for each."""
    peak_anonymous_bytes: int
    """The same without files, which the system may drop whenever it wants the memory."""
    peak_file_bytes: int
    stopped: str | None
    """Why it was killed; None if it ended by itself."""
    status: int
    output: str
    """What it printed on standard output."""
    errors: str
    """The end of what it printed on standard error."""


def watch(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    most_bytes: int | None = None,
    most_seconds: float | None = None,
    least_free_disk: tuple[Path, int] | None = None,
) -> Watched:
    """Run a command to its end, or until it goes beyond a limit.

    Args:
        command: Its program and arguments.
        environment: Beside this process's own.
        most_bytes: Resident memory above which it is killed.
        most_seconds: Time after which it is killed.
        least_free_disk: A directory, and the bytes free there below which it is killed.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        peaks = dict.fromkeys(_FIELDS, 0)
        stopped = None
        try:
            while True:
                ended, status = os.waitpid(process.pid, os.WNOHANG)
                if ended:
                    break
                now = _memory(process.pid)
                peaks = {name: max(peaks[name], now[name]) for name in _FIELDS}
                if stopped is None:
                    stopped = _reason(now["VmRSS"], started, most_bytes, most_seconds, least_free_disk)
                    if stopped is not None:
                        os.killpg(process.pid, signal.SIGKILL)
                time.sleep(INTERVAL_SECONDS)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        return Watched(
            seconds=seconds,
            # The system sees every peak of a process, which may fall between two looks at it. What it reports
            # at the end (ru_maxrss) counts what this process held when it started the command.
            peak_bytes=max(peaks["VmRSS"], peaks["VmHWM"]),
            peak_anonymous_bytes=peaks["RssAnon"],
            peak_file_bytes=peaks["RssFile"],
            stopped=stopped,
            status=process.returncode,
            output=_text(output),
            errors=_text(errors)[-2000:],
        )


def _reason(
    resident: int,
    started: float,
    most_bytes: int | None,
    most_seconds: float | None,
    least_free_disk: tuple[Path, int] | None,
) -> str | None:
    if most_bytes is not None and resident > most_bytes:
        return f"killed at {resident / 2**30:.1f} GiB"
    if most_seconds is not None and time.perf_counter() - started > most_seconds:
        return f"killed after {most_seconds:.0f} s"
    if least_free_disk is not None:
        where, least = least_free_disk
        if shutil.disk_usage(where).free < least:
            return f"killed with less than {least / 1e9:.0f} GB of disk free"
    return None


def memory(pid: int | None = None) -> dict[str, int]:
    """Resident bytes of one process, this one unless another is named: now, at most, anonymous, of files."""
    found = dict.fromkeys(_FIELDS, 0)
    try:
        lines = Path(f"/proc/{pid or os.getpid()}/status").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return found
    for line in lines:
        name, _, value = line.partition(":")
        if name in found:
            found[name] = int(value.split()[0]) * 1024
    return found


def _memory(pid: int) -> dict[str, int]:
    each = [memory(process) for process in _tree(pid)]
    found = {name: sum(one[name] for one in each) for name in _FIELDS}
    # Highest marks of several processes were not reached at once.
    return found | {"VmHWM": max(one["VmHWM"] for one in each)}


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = tasks.read_text(encoding="ascii").split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in children:
            yield from _tree(int(child))


def _text(stream: object) -> str:
    stream.seek(0)  # type: ignore[attr-defined]
    return stream.read().decode(errors="replace")  # type: ignore[attr-defined, no-any-return]


def drop_from_cache(files: Iterable[Path]) -> None:
    """Have files read from the disk by whoever reads them next."""
    for path in files:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_to_read(files: Sequence[Path]) -> float:
    """Seconds to read files once from the disk, one after another."""
    drop_from_cache(files)
    buffer = bytearray(_BLOCK)
    started = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - started
