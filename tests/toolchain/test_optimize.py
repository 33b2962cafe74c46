"""The optimisation loop resumes exactly and stops at nonsense."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from toolchain.checkpoints import Checkpoints
from toolchain.errors import ToolchainError
from toolchain.interrupts import Stopped, stoppable
from toolchain.optimize import Checks, Schedule, optimize_, take_

SCHEDULE = Schedule(steps=10, learning_rate=0.1, warmup_steps=2, ema_decay=0.9, checkpoint_every=5)


def fresh() -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    return model


def run(
    model: nn.Linear,
    checkpoints: Checkpoints | None = None,
    fail_at: int | None = None,
    schedule: Schedule = SCHEDULE,
    checks: Checks | None = None,
    signal_at: int | None = None,
) -> nn.Linear:
    def loss_at(step: int) -> torch.Tensor:
        if step == signal_at:
            signal.raise_signal(signal.SIGTERM)
        batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        factor = float("nan") if step == fail_at else 1.0
        return factor * model(batch).square().mean()

    optimize_(model, loss_at, schedule, checkpoints=checkpoints, checks=checks)
    return model


def test_a_run_that_was_stopped_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="the loss became nan at step 7"):
        run(fresh(), Checkpoints(directory=tmp_path), fail_at=7)
    resumed = run(fresh(), Checkpoints(directory=tmp_path))
    assert torch.equal(resumed.weight, run(fresh()).weight)


def test_frozen_parameters_stay() -> None:
    assert torch.equal(run(fresh()).bias, fresh().bias)


def test_the_rate_rises_stays_and_falls() -> None:
    schedule = Schedule(steps=100, learning_rate=1.0, warmup_steps=10, cooldown=0.5)
    assert [schedule.rate_at(step) for step in (0, 4, 9, 30, 50)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    assert schedule.rate_at(75) == pytest.approx(0.5)
    assert 0 < schedule.rate_at(99) <= 0.02


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("fail_at", [1, 5, 9])
def test_wherever_a_run_stops_it_ends_as_an_undisturbed_one(
    ema_decay: float | None, fail_at: int, tmp_path: Path
) -> None:
    schedule = replace(SCHEDULE, ema_decay=ema_decay, checkpoint_every=2)
    state = Checkpoints(directory=tmp_path)
    with pytest.raises(ToolchainError):
        run(fresh(), state, fail_at=fail_at, schedule=schedule)
    resumed = run(fresh(), state, schedule=schedule)
    assert torch.equal(resumed.weight, run(fresh(), schedule=schedule).weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonsense_ends_a_run_and_leaves_its_last_checkpoint(value: float, tmp_path: Path) -> None:
    model, state = fresh(), Checkpoints(directory=tmp_path)
    before: dict[int, torch.Tensor] = {}

    def loss_at(step: int) -> torch.Tensor:
        before[step] = model.weight.detach().clone()
        return model(torch.ones(1, 3)).square().mean() * (value if step == 7 else 1.0)

    with pytest.raises(ToolchainError, match="at step 7"):
        optimize_(model, loss_at, SCHEDULE, checkpoints=state)
    with state.latest() as stored:
        assert stored is not None
        assert stored.step == 5
        assert torch.equal(stored.get("value/weight"), before[5])
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005.safetensors"]


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(tmp_path: Path) -> None:
    run(fresh(), Checkpoints(directory=tmp_path))
    with Checkpoints(directory=tmp_path).latest() as stored:
        assert stored is not None
        assert stored.names == {
            f"{part}/weight" for part in ("value", "exp_avg", "exp_avg_sq", "step", "average")
        }


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_run_that_is_done_is_not_done_again(ema_decay: float | None, tmp_path: Path) -> None:
    schedule = replace(SCHEDULE, ema_decay=ema_decay)
    state = Checkpoints(directory=tmp_path)
    done = run(fresh(), state, schedule=schedule)

    def never(step: int) -> torch.Tensor:
        raise AssertionError(step)

    again = fresh()
    optimize_(again, never, schedule, checkpoints=state)
    assert torch.equal(again.weight, done.weight)


def test_every_step_is_told_once_and_in_order() -> None:
    told: list[tuple[int, float]] = []
    model = fresh()
    optimize_(
        model, lambda step: model.weight.sum() * 0 + step, SCHEDULE, on_step=lambda *it: told.append(it)
    )
    assert told == [(step, float(step)) for step in range(10)]


@given(
    steps=st.integers(1, 500),
    warmup=st.floats(0, 0.25),
    cooldown=st.floats(0, 0.75),
)
def test_the_rate_is_never_above_its_peak_nor_0_and_falls_from_there(
    steps: int, warmup: float, cooldown: float
) -> None:
    warmup_steps = int(warmup * steps)
    schedule = Schedule(steps=steps, learning_rate=2.0, warmup_steps=warmup_steps, cooldown=cooldown)
    rates = [schedule.rate_at(step) for step in range(steps)]
    assert all(0 < rate <= 2.0 for rate in rates)
    rising, falling = rates[:warmup_steps], rates[warmup_steps:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert falling[0] == 2.0


def test_strength_scales_the_rate_whatever_the_gradient() -> None:
    # The first step of Adam moves every weight by its rate.
    schedule = Schedule(steps=1, learning_rate=0.5, warmup_steps=0, cooldown=0.0, weight_decay=0.0)
    model, start = nn.Linear(3, 2), nn.Linear(3, 2)
    start.load_state_dict(model.state_dict())
    optimize_(model, lambda _: model.weight.sum() + 1e3 * model.bias.sum(), schedule, strength={"bias": 0.25})
    torch.testing.assert_close(model.weight, start.weight - 0.5)
    torch.testing.assert_close(model.bias, start.bias - 0.125)


def test_a_gradient_that_is_not_finite_ends_a_run_before_it_does_harm() -> None:
    model = fresh()
    with pytest.raises(ToolchainError, match="norm of the gradient became nan at step 0"):
        # The square root has a value at 0 and no gradient.
        optimize_(model, lambda _: (model.weight * 0).sum().sqrt(), SCHEDULE)
    assert torch.equal(model.weight, fresh().weight)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 0.2}, "learning_rate was 0.1 and is 0.2"),
        ({"ema_decay": None}, "ema_decay was 0.9 and is null"),
        ({"steps": 6}, "it was to have 10 steps and now 6"),
    ],
)
def test_a_checkpoint_of_another_schedule_is_refused(
    change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    run(fresh(), Checkpoints(directory=tmp_path))
    with pytest.raises(ToolchainError, match=named):
        run(fresh(), Checkpoints(directory=tmp_path), schedule=replace(SCHEDULE, **change))


def test_a_run_can_be_made_longer_before_its_rate_falls(tmp_path: Path) -> None:
    state, longer = Checkpoints(directory=tmp_path), replace(SCHEDULE, steps=14)
    with pytest.raises(ToolchainError):
        run(fresh(), state, fail_at=6)
    assert torch.equal(run(fresh(), state, schedule=longer).weight, run(fresh(), schedule=longer).weight)


def test_a_checkpoint_says_what_it_belongs_to(tmp_path: Path) -> None:
    state, model = Checkpoints(directory=tmp_path), fresh()
    optimize_(model, lambda _: model.weight.sum(), SCHEDULE, belongs_to={"seed": 1}, checkpoints=state)
    with pytest.raises(ToolchainError, match="another training: seed was 1 and is 2"):
        optimize_(model, lambda _: model.weight.sum(), SCHEDULE, belongs_to={"seed": 2}, checkpoints=state)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    state = Checkpoints(directory=tmp_path)
    (tmp_path / "step-00000005.safetensors").write_bytes(b"nothing")
    with pytest.raises(ToolchainError, match="is no checkpoint of this training"):
        run(fresh(), state)


def test_a_parameter_the_loss_does_not_depend_on_stays_and_is_resumed(tmp_path: Path) -> None:
    model = nn.ModuleDict({"used": fresh(), "unused": fresh()})
    for _ in range(2):
        optimize_(
            model,
            lambda _: model["used"].weight.sum(),
            replace(SCHEDULE, ema_decay=None),
            checkpoints=Checkpoints(directory=tmp_path),
        )
    assert torch.equal(model["unused"].weight, fresh().weight)


def test_the_rate_is_what_the_step_is_taken_with() -> None:
    # The first step of Adam moves every weight by the rate, whatever the gradient.
    schedule = Schedule(steps=1, learning_rate=0.5, warmup_steps=4, weight_decay=0.0)
    model, start = fresh(), fresh().weight
    optimize_(model, lambda _: model.weight.sum(), schedule)
    torch.testing.assert_close(model.weight, start - 0.125)


@pytest.mark.parametrize("signal_at", [0, 6, 9])
def test_a_signal_ends_a_run_behind_its_step_and_it_goes_on_from_there(
    signal_at: int, tmp_path: Path
) -> None:
    state = Checkpoints(directory=tmp_path)
    with pytest.raises(Stopped, match="SIGTERM"), stoppable():
        run(fresh(), state, signal_at=signal_at)
    with state.latest() as stored:
        assert stored is not None
        assert stored.step == signal_at + 1
    assert torch.equal(run(fresh(), state).weight, run(fresh()).weight)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_check_sees_what_a_run_of_so_many_steps_ends_with(ema_decay: float | None, tmp_path: Path) -> None:
    schedule = replace(SCHEDULE, ema_decay=ema_decay, cooldown=0.0)
    model, seen = fresh(), {}

    def harm(step: int) -> float:
        seen[step] = model.weight.detach().clone()
        return 1.0

    checked = run(model, schedule=schedule, checks=Checks(every=4, harm=harm))
    assert list(seen) == [4, 8]
    assert all(
        torch.equal(weight, run(fresh(), schedule=replace(schedule, steps=step)).weight)
        for step, weight in seen.items()
    )
    assert torch.equal(checked.weight, run(fresh(), schedule=schedule).weight)


def test_a_run_ends_as_soon_as_it_suffices_and_stays_ended(tmp_path: Path) -> None:
    state = Checkpoints(directory=tmp_path)
    looked: list[int] = []

    def harm(step: int) -> float:
        looked.append(step)
        return 0.5 if step >= 4 else 2.0

    checks = Checks(every=2, harm=harm, enough=0.5)
    ended = run(fresh(), state, checks=checks)
    again = run(fresh(), state, checks=checks)
    assert looked == [2, 4]
    assert torch.equal(ended.weight, again.weight)
    with state.latest() as stored:
        assert stored is not None
        assert (stored.step, stored.harm) == (4, 0.5)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_the_best_of_a_run_can_be_had_afterwards(ema_decay: float | None, tmp_path: Path) -> None:
    state = Checkpoints(directory=tmp_path)
    schedule = replace(SCHEDULE, ema_decay=ema_decay)
    model, seen = fresh(), {}

    def harm(step: int) -> float:
        seen[step] = model.weight.detach().clone()
        return abs(step - 4.0)

    run(model, state, schedule=schedule, checks=Checks(every=2, harm=harm))
    best = state.best()
    assert best is not None
    assert [path.name for path in state.paths()] == [best[1].name, "step-00000010.safetensors"]
    assert take_(model, best[1]) == 4
    assert torch.equal(model.weight, seen[4])


def test_a_check_without_steps_between_is_refused() -> None:
    with pytest.raises(ToolchainError, match="every 0 steps"):
        Checks(every=0, harm=lambda _: 0.0)
