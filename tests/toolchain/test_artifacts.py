"""What reaches the disk reaches it whole, and what comes back is checked."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from toolchain.artifacts import check_new_directory, new_directory, read_json, sha256, write_json
from toolchain.errors import ToolchainError


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [False, True])
def test_an_error_leaves_things_as_they_were(
    error: type[BaseException], exists: bool, tmp_path: Path
) -> None:
    if exists:
        (tmp_path / "out").mkdir()

    def stop_half_way() -> None:
        with new_directory(tmp_path / "out") as directory:
            (directory / "half").mkdir()
            (directory / "half" / "file").write_text("written")
            raise error

    with pytest.raises(error):
        stop_half_way()
    assert [path.name for path in tmp_path.rglob("*")] == ["out"] * exists


def test_nothing_is_seen_at_the_path_before_all_is_written(tmp_path: Path) -> None:
    with new_directory(tmp_path / "out") as directory:
        (directory / "file").write_text("written")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]


def test_an_empty_directory_is_taken_and_parents_are_made(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "new" / "er" / "out"):
        with new_directory(path) as directory:
            (directory / "file").write_text("written")
        assert (path / "file").read_text() == "written"
        assert path.stat().st_mode & 0o777 == 0o755


def killed_half_way(path: str) -> None:
    """In a process of its own."""
    with new_directory(Path(path)) as directory:
        (directory / "file").write_text("written")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_left_is_removed_by_the_next_and_what_another_writes_now_is_not(
    tmp_path: Path,
) -> None:
    for name in ("out", "out.more"):
        process = multiprocessing.get_context("spawn").Process(
            target=killed_half_way, args=(str(tmp_path / name),)
        )
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    (tmp_path / ".out.settings").mkdir()
    (tmp_path / ".out.settings" / "file").write_text("the user's own")
    assert len(list(tmp_path.iterdir())) == 3
    with new_directory(tmp_path / "out") as directory:
        (directory / "file").write_text("written")
        check_new_directory(tmp_path / "out")
    (left,) = {path.name for path in tmp_path.iterdir()} - {"out", ".out.settings"}
    assert left.startswith(".out.more.")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("full", "is not empty"),
        ("full/file", "is a file"),
        ("full/file/out", "cannot write .*Not a directory"),
    ],
)
def test_what_cannot_be_written_is_refused_at_once(path: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    with pytest.raises(ToolchainError, match=message):
        check_new_directory(tmp_path / path)
    with pytest.raises(ToolchainError, match=message), new_directory(tmp_path / path):
        raise AssertionError
    assert sorted(item.name for item in tmp_path.rglob("*")) == ["file", "full"]
    assert (tmp_path / "full" / "file").read_text() == "kept"


def test_a_check_leaves_nothing_behind(tmp_path: Path) -> None:
    check_new_directory(tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", [".", "link", "dangling"])
def test_what_passes_the_check_is_written_in_the_end(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path / "empty" if output == "." else tmp_path)
    try:
        check_new_directory(Path(output))
    except ToolchainError:
        return
    with new_directory(Path(output)) as directory:
        (directory / "file").write_text("written")
    assert (Path(output) / "file").read_text() == "written"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[1]", "holds a list, not an object"),
        (b"null", "holds a NoneType, not an object"),
    ],
)
def test_what_is_no_json_object_is_refused_by_name(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "thing.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ToolchainError, match=rf"thing\.json {message}"):
        read_json(path)


def test_a_directory_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="cannot be read as JSON"):
        read_json(tmp_path)


def test_json_reads_as_it_was_written(tmp_path: Path) -> None:
    value = {"name": "é", "list": [1, 2.5, None]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_what_is_no_number_is_not_written_over_what_is(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"harm": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"harm": float("nan")})
    assert json.loads(path.read_text()) == {"harm": 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_digest_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "file") == known


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    def fill(path: Path) -> None:
        with new_directory(path) as directory:
            (directory / "file").write_text("written")
            Path("/dev/full").write_text("no room")

    with pytest.raises(ToolchainError, match=r"out: its disk is full .*No space left.*HPTOOL_CACHE"):
        fill(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def limited_write(path: str) -> None:
    """In a process of its own, where no file may exceed 4 KiB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    with pytest.raises(ToolchainError, match="its disk is full"), new_directory(Path(path)) as directory:
        save_file({"weight": torch.zeros(1 << 16)}, directory / "model.safetensors")


def test_weights_that_the_disk_has_no_room_for_are_the_same_error(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=limited_write, args=(str(tmp_path / "out"),)
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    assert list(tmp_path.iterdir()) == []
