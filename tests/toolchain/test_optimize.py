"""The optimisation loop resumes exactly and stops at nonsense."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from toolchain.optimize import Schedule, optimize_

SCHEDULE = Schedule(steps=10, learning_rate=0.1, warmup_steps=2, ema_decay=0.9, checkpoint_every=5)


def fresh() -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    return model


def run(model: nn.Linear, checkpoint: Path | None = None, fail_at: int | None = None) -> nn.Linear:
    def loss_at(step: int) -> torch.Tensor:
        batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        factor = float("nan") if step == fail_at else 1.0
        return factor * model(batch).square().mean()

    optimize_(model, loss_at, SCHEDULE, checkpoint=checkpoint)
    return model


def test_a_run_that_was_stopped_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="the loss became nan at step 7"):
        run(fresh(), tmp_path / "state.safetensors", fail_at=7)
    resumed = run(fresh(), tmp_path / "state.safetensors")
    assert torch.equal(resumed.weight, run(fresh()).weight)


def test_frozen_parameters_stay() -> None:
    assert torch.equal(run(fresh()).bias, fresh().bias)


def test_the_rate_rises_stays_and_falls() -> None:
    schedule = Schedule(steps=100, learning_rate=1.0, warmup_steps=10, cooldown=0.5)
    assert [schedule.rate_at(step) for step in (0, 4, 9, 30, 50)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    assert schedule.rate_at(75) == pytest.approx(0.5)
    assert 0 < schedule.rate_at(99) <= 0.02
