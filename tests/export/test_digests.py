"""A file is read once for its digest, whoever asks first, and again when it changed."""

from __future__ import annotations

import mmap
import threading
from pathlib import Path

import pytest
from blake3 import blake3

from export import digests
from export.digests import FileDigests
from toolchain.errors import ToolchainError


class Slow:
    """BLAKE3 that goes on when it is let."""

    begun, let = threading.Event(), threading.Event()
    updates = 0

    def __init__(self) -> None:
        self._digest = blake3()

    def update(self, data: bytes) -> None:
        Slow.updates += 1
        Slow.begun.set()
        assert Slow.let.wait(60)
        self._digest.update(data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> type[Slow]:
    Slow.begun, Slow.let, Slow.updates = threading.Event(), threading.Event(), 0
    monkeypatch.setattr(digests, "blake3", Slow)
    return Slow


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    return path


def test_a_digest_is_remembered_until_the_file_changes(file: Path, tmp_path: Path) -> None:
    own = FileDigests(tmp_path / "cache")
    assert not own.remembers([file])
    assert own.digest(file) == blake3(b"weights").hexdigest()
    assert FileDigests(tmp_path / "cache").remembers([file])
    file.write_bytes(b"others")
    assert not own.remembers([file])
    assert own.digest(file) == blake3(b"others").hexdigest()


def test_a_file_that_is_being_read_ahead_is_not_read_again(
    file: Path, tmp_path: Path, slow: type[Slow]
) -> None:
    own = FileDigests(tmp_path)
    with own.ahead([file]):
        assert slow.begun.wait(60)
        threading.Timer(0.1, slow.let.set).start()
        assert own.digest(file) == blake3(b"weights").hexdigest()
    assert slow.updates == 1


def test_what_is_unread_when_the_work_ends_stays_so(file: Path, tmp_path: Path, slow: type[Slow]) -> None:
    own, other = FileDigests(tmp_path), tmp_path / "other"
    with other.open("wb") as stream:
        stream.truncate(2 * digests._WINDOW)
    with own.ahead([other, file]):
        assert slow.begun.wait(60)
        threading.Timer(0.1, slow.let.set).start()
    assert slow.updates == 1
    assert not own.remembers([other])
    assert not own.remembers([file])


def test_a_file_that_cannot_be_read_is_told_to_who_asks(file: Path, tmp_path: Path) -> None:
    own = FileDigests(tmp_path / "cache")
    with own.ahead([tmp_path / "none", file]):
        with pytest.raises(FileNotFoundError):
            own.digest(tmp_path / "none")
        own.digest(file)


@pytest.mark.filterwarnings("error")
def test_a_damaged_memory_is_told_to_who_asks(file: Path, tmp_path: Path) -> None:
    (tmp_path / "blake3.json").write_text("no JSON")
    own = FileDigests(tmp_path)
    with own.ahead([file]), pytest.raises(ToolchainError, match="cannot be read as JSON"):
        own.digest(file)


def test_an_empty_file_and_one_of_several_windows_have_digests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_WINDOW", mmap.PAGESIZE)
    for data in (b"", bytes(range(256)) * (mmap.PAGESIZE // 100)):
        (tmp_path / "file").write_bytes(data)
        assert FileDigests(tmp_path / "cache").digest(tmp_path / "file") == blake3(data).hexdigest()
