"""A model is judged the same way at every stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from toolchain.errors import ToolchainError
from toolchain.families import Model
from toolchain.gate import Gate
from toolchain.geometry import Unit
from toolchain.judge import Judge, write_grid
from toolchain.metrics import PictureMetric
from toolchain.trajectories import States

PROMPTS = ["a red circle", "two squares"]


def judge(teacher: Model, states: States, gate: Gate | None = None, captions_per_task: int = 0) -> Judge:
    return Judge(teacher, states, PROMPTS, gate=gate, captions_per_task=captions_per_task, seed=0)


def test_a_teacher_makes_no_error_and_one_without_a_block_does(tiny: Model, states: States) -> None:
    ask = judge(tiny, states)
    whole, thinned = ask("original", tiny), ask("pruned", tiny.without_units([Unit(2)]))
    assert whole.velocity_error < 1e-8 < thinned.velocity_error
    assert whole.num_parameters > thinned.num_parameters
    assert (whole.score, whole.gate) == (None, None)


def test_the_value_of_a_gate_of_velocity_is_the_error(tiny: Model, states: States) -> None:
    found = judge(tiny, states, Gate(metric="velocity", bound=1.0))("pruned", tiny.without_units([Unit(2)]))
    assert found.gate == found.velocity_error


def test_the_value_of_a_gate_of_shapes_is_the_score(tiny: Model, states: States) -> None:
    found = judge(tiny, states, Gate(metric="shapes", bound=0.5), captions_per_task=1)("original", tiny)
    assert found.score is not None
    assert found.gate == found.score.mean


def test_any_metric_of_pictures_judges_those_of_the_prompts(
    tiny: Model, states: States, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    class Beauty(PictureMetric):
        def check(self, prompts: Sequence[str]) -> None:
            given.append(list(prompts))

        def scores(self, prompts: Sequence[str], pictures: np.ndarray) -> np.ndarray:
            given.append((list(prompts), pictures.shape))
            return np.array([0.25, 0.75])

    monkeypatch.setattr("toolchain.judge.open_metric", lambda _: Beauty())
    assert judge(tiny, states, Gate(metric="beauty", bound=0.5))("original", tiny).gate == 0.5
    assert given == [PROMPTS, (PROMPTS, (2, 64, 64, 3))]


@pytest.mark.parametrize(
    ("metric", "message"),
    [("beauty", "'beauty' is not installed"), ("shapes", r"needs captions \(--per-task\)")],
)
def test_a_gate_that_cannot_be_measured_is_refused(
    metric: str, message: str, tiny: Model, states: States
) -> None:
    with pytest.raises(ToolchainError, match=message):
        judge(tiny, states, Gate(metric=metric, bound=0.5))


def test_pictures_are_of_the_same_noise_each_time_and_no_more_than_there_are_prompts(
    tiny: Model, states: States
) -> None:
    ask = judge(tiny, states)
    both, one = ask.paint(tiny, 16), ask.paint(tiny, 1)
    assert both.shape == (2, 64, 64, 3)
    # Pictures in other company differ in the last bit before they are rounded.
    assert np.abs(both[:1].astype(int) - one).max() <= 1


def test_a_student_whose_learning_weights_are_float32_is_judged_as_it_is(tiny: Model, states: States) -> None:
    ask = judge(tiny, states)
    tiny.pipeline.to(torch.bfloat16)
    tiny.pipeline.transformer.transformer_blocks[-1].float()
    assert ask("step 1", tiny).velocity_error < 0.01
    assert ask.paint(tiny, 1).shape == (1, 64, 64, 3)


def test_a_grid_is_about_square_and_white_where_pictures_end(tmp_path: Path) -> None:
    pictures = np.zeros((3, 4, 5, 3), dtype=np.uint8)
    pictures[1] = 7
    write_grid(tmp_path / "new" / "grid.png", pictures)
    found = np.array(Image.open(tmp_path / "new" / "grid.png"))
    assert found.shape == (8, 10, 3)
    assert (found[:4, :5] == 0).all()
    assert (found[:4, 5:] == 7).all()
    assert (found[4:, 5:] == 255).all()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["grid.png"]
