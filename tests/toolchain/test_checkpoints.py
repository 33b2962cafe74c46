"""Checkpoints are whole or not there, and no more of them than are wanted."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from toolchain import checkpoints
from toolchain.checkpoints import Checkpoints
from toolchain.errors import ToolchainError

TENSORS = {"half": torch.ones(3, dtype=torch.bfloat16), "one": torch.tensor(7.0), "many": torch.arange(6.0)}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    kept = Checkpoints(directory=tmp_path / "a" / "b")
    kept.write(3, {"seed": 1}, TENSORS, harm=0.5)
    with kept.latest() as found:
        assert found is not None
        assert (found.step, found.run, found.harm, found.names) == (3, {"seed": 1}, 0.5, set(TENSORS))
        assert all(torch.equal(found.get(name), item) for name, item in TENSORS.items())


def test_any_reader_of_safetensors_reads_one(tmp_path: Path) -> None:
    Checkpoints(directory=tmp_path).write(3, {}, TENSORS)
    found = load_file(tmp_path / "step-00000003.safetensors")
    assert {name: item.dtype for name, item in found.items()} == {
        name: item.dtype for name, item in TENSORS.items()
    }
    assert torch.equal(found["many"], TENSORS["many"])


def test_an_empty_directory_has_none(tmp_path: Path) -> None:
    with Checkpoints(directory=tmp_path / "none").latest() as found:
        assert found is None


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    kept = Checkpoints(directory=tmp_path, keep=2)
    for step, harm in [(1, None), (2, 0.3), (3, 0.1), (4, None), (5, 0.1), (6, 0.2)]:
        kept.write(step, {}, TENSORS, harm=harm)
    assert names(tmp_path) == [f"step-0000000{step}.safetensors" for step in (3, 5, 6)]
    assert kept.best() == (0.1, tmp_path / "step-00000003.safetensors")


def test_a_tensor_is_made_whole_when_its_turn_comes(tmp_path: Path) -> None:
    asked: list[int] = []

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        asked.append(tensor.numel())
        return tensor + 1

    Checkpoints(directory=tmp_path).write(1, {}, TENSORS, whole=whole)
    assert asked == [1, 6, 3]
    assert torch.equal(load_file(tmp_path / "step-00000001.safetensors")["many"], TENSORS["many"] + 1)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Checkpoints(directory=tmp_path)
    kept.write(1, {}, TENSORS)

    def full(_: torch.Tensor) -> memoryview:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "tensor_bytes", full)
    with pytest.raises(ToolchainError, match=r"its disk is full .* goes on from step-00000001.safetensors"):
        kept.write(2, {}, TENSORS)
    assert names(tmp_path) == ["step-00000001.safetensors"]


def test_what_a_killed_writer_left_is_not_read_and_goes_with_the_next(tmp_path: Path) -> None:
    kept = Checkpoints(directory=tmp_path)
    kept.write(1, {}, TENSORS)
    (tmp_path / "step-00000002.part").write_bytes(b"half of it")
    with kept.latest() as found:
        assert found is not None
        assert found.step == 1
    kept.write(3, {}, TENSORS)
    assert names(tmp_path) == ["step-00000003.safetensors"]


@pytest.mark.parametrize("content", [b"", b"nothing", None], ids=["empty", "noise", "cut"])
def test_a_broken_one_is_an_error_that_names_it(content: bytes | None, tmp_path: Path) -> None:
    kept = Checkpoints(directory=tmp_path)
    kept.write(1, {}, TENSORS)
    path = tmp_path / "step-00000001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    with pytest.raises(ToolchainError, match=r"step-00000001\.safetensors is no checkpoint"), kept.latest():
        pass


def test_one_of_another_tool_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "step-00000001.safetensors", metadata={"step": "1"})
    with (
        pytest.raises(ToolchainError, match="schema_version"),
        Checkpoints(directory=tmp_path).latest(),
    ):
        pass


def test_none_kept_is_no_policy(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="0 checkpoints are to be kept"):
        Checkpoints(directory=tmp_path, keep=0)
