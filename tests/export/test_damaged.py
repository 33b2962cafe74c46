"""A checkpoint that is damaged is one message of `hptool export`, which begins no bundle."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from toolchain import cli
from toolchain.artifacts import write_json

STEM = "diffusion_pytorch_model"
SHARDS = (f"{STEM}-00001-of-00002.safetensors", f"{STEM}-00002-of-00002.safetensors")
WEIGHT = "proj_out.weight"


def truncate(part: Path) -> None:
    whole = (part / SHARDS[1]).read_bytes()
    (part / SHARDS[1]).write_bytes(whole[: len(whole) // 2])


def change(part: Path, alter: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(part / SHARDS[1])
    alter(tensors)
    save_file(tensors, part / SHARDS[1])


@pytest.fixture
def sharded(path: Path, tmp_path: Path) -> Path:
    """The tiny model, its transformer in two shards of which the second has the last linear."""
    model = tmp_path / "model"
    shutil.copytree(path, model)
    part = model / "transformer"
    tensors = load_file(part / f"{STEM}.safetensors")
    (part / f"{STEM}.safetensors").unlink()
    places = {name: SHARDS[name == WEIGHT] for name in tensors}
    for shard in SHARDS:
        save_file({name: tensors[name] for name in tensors if places[name] == shard}, part / shard)
    write_json(part / f"{STEM}.safetensors.index.json", {"metadata": {}, "weight_map": places})
    return model


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(truncate, "cannot be read", id="truncated shard"),
        pytest.param(lambda part: (part / SHARDS[1]).unlink(), f"lacks {SHARDS[1]}, which", id="lost shard"),
        pytest.param(
            lambda part: change(part, lambda tensors: tensors.update({"other": tensors.pop(WEIGHT)})),
            f"lacks weights of its transformer: {WEIGHT}",
            id="lost tensor",
        ),
        pytest.param(
            lambda part: change(part, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].char()})),
            f"holds {WEIGHT} of its transformer as I8",
            id="wrong type",
        ),
    ],
)
def test_a_damaged_checkpoint_is_one_message_and_no_bundle(
    sharded: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(sharded / "transformer")
    monkeypatch.setenv("HPTOOL_CACHE", str(tmp_path / "cache"))
    command = ["hptool", "export", str(sharded), "--output", str(tmp_path / "bundle")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert {entry.name for entry in tmp_path.iterdir()} <= {"model", "cache"}  # digests were remembered
