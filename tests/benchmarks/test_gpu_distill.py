"""The measurement runs, in small and without a GPU, and takes the weights it is about."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import gpu_distill
from toolchain.artifacts import read_json


def test_every_way_is_timed_and_leaves_the_teacher_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    gpu_distill.main(device="cpu", steps=3, small=True, output=tmp_path / "found.json")
    found = read_json(tmp_path / "found.json")
    assert list(found["models"]) == ["SD3.5-Medium", "SD3.5-Large"]
    for model in found["models"].values():
        assert list(model["ways"]) == ["whole", "shared", "cached", "in-turn"]
        for row in model["ways"].values():
            assert row["seconds_per_step"] > 0
            assert (row["peak_bytes"], row["fits"]) == (None, {}), "there is no GPU to ask"
        sizes = [row["arithmetic_bytes"] for row in model["ways"].values()]
        assert sizes == sorted(sizes, reverse=True)
    assert "SD3.5-Large" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_running_out_of_memory_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu_distill, "_train", full)
    model, plan, states = gpu_distill._problem("sd3.5-medium-paper", torch.device("cpu"), small=True)
    found = gpu_distill._run("shared", model, plan, states, 2, None)
    assert found["seconds_per_step"] is None


def test_two_models_and_one_prefix_train_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan, states = gpu_distill._problem("sd3.5-medium-paper", torch.device("cpu"), small=True)
    assert plan.shared_prefix == 2
    assert {item.dtype for item in model.pipeline.transformer.parameters()} == {torch.bfloat16}
    learning = []
    monkeypatch.setattr(
        gpu_distill,
        "optimize_",
        lambda module, *_, **__: learning.append(
            {name for name, item in module.named_parameters() if item.requires_grad}
        ),
    )
    monkeypatch.setattr("toolchain.distill.optimize_", gpu_distill.optimize_)
    for way in ("whole", "shared"):
        gpu_distill._train(way, model, plan, states, 1, lambda *_: None)  # type: ignore[arg-type]
    assert learning[0] == learning[1]
    assert learning[0]
