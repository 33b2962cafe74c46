"""The optimisation loop that every training in the project runs through: resumable, exact, pickle-free."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolchain import interrupts
from toolchain.checkpoints import Checkpoint, Checkpoints, open_checkpoint
from toolchain.errors import ToolchainError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast to train."""

    steps: int
    learning_rate: float
    warmup_steps: int = 100
    """Steps of linear increase, before the rate stays at its peak."""
    cooldown: float = 0.3
    """Share of the steps, at the end, over which the rate falls linearly to nothing. Until then a run
    can be made longer or shorter without having to start again."""
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float | None = None
    """Decay of the averaged weights the model ends with; None ends with the last weights."""
    checkpoint_every: int = 250

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        return self.learning_rate * min(1.0, (self.steps - step) / max(1.0, self.cooldown * self.steps))


@dataclass(frozen=True, kw_only=True)
class Checks:
    """Looks at a model in the middle of its training."""

    every: int
    """Steps between them."""
    harm: Callable[[int], float]
    """Called with the steps taken, while the model is what it would be if training ended now: how bad it is.
    Each of its answers is saved with a checkpoint, so that the best one stays."""
    enough: float | None = None
    """Training ends as soon as the harm is no more than this."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ToolchainError(f"a model is to be checked every {self.every} steps; it is at least 1")

    def met(self, harm: float | None) -> bool:
        """Whether no more training is wanted."""
        return harm is not None and self.enough is not None and harm <= self.enough


def optimize_(
    model: nn.Module,
    loss_at: Callable[[int], torch.Tensor],
    schedule: Schedule,
    *,
    strength: Mapping[str, float] | None = None,
    belongs_to: Mapping[str, Any] | None = None,
    checkpoints: Checkpoints | None = None,
    checks: Checks | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> int:
    """Train a model's unfrozen parameters in place with AdamW.

    A signal to end is held back until the step is taken and, where there are checkpoints, saved.

    Args:
        model: Its parameters with `requires_grad` are trained and, with EMA, replaced by their average.
        loss_at: The loss of a step. A run resumes exactly if this depends on the step alone, so it
            should draw its batch from a generator seeded with the step's number.
        schedule: How long and how fast.
        strength: By name of parameter, the share of the learning rate it is trained with; 1 for what is not
            named. The rate is scaled and not the gradient, for AdamW divides by the gradient's own size:
            its updates are the same whatever a gradient is multiplied by.
        belongs_to: What else the run depends on, as JSON takes it; a checkpoint of another run is refused.
        checkpoints: Where the state lies between steps: the last one is continued from.
        checks: Looks at the model from time to time, and may find that it suffices.
        on_step: Called with the step's number and its loss.

    Returns:
        Steps the model has behind it: fewer than scheduled if it was found to suffice.

    Raises:
        ToolchainError: The loss or its gradient is no longer finite, or the checkpoint is another run's,
            or cannot be written.
    """
    parameters = {name: item for name, item in model.named_parameters() if item.requires_grad}
    values = list(parameters.values())
    groups: dict[float, list[nn.Parameter]] = {}
    for name, item in parameters.items():
        groups.setdefault((strength or {}).get(name, 1.0), []).append(item)
    optimizer = torch.optim.AdamW(
        [{"params": items, "strength": share} for share, items in groups.items()],
        lr=schedule.learning_rate,
        weight_decay=schedule.weight_decay,
        betas=(0.9, 0.99),
        fused=True,
    )
    average = [item.detach().clone() for item in values] if schedule.ema_decay else []
    run = json.loads(json.dumps({"schedule": asdict(schedule), **(belongs_to or {})}))
    taken, done = 0, False
    if checkpoints is not None:
        with checkpoints.latest() as stored:
            if stored is not None:
                _check_run(stored, run, schedule)
                _load_(stored, parameters, optimizer, average)
                taken, done = stored.step, checks is not None and checks.met(stored.harm)
    with interrupts.held() as stopping:
        for step in range(taken, schedule.steps):
            if done or stopping():
                break
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate_at(step) * group["strength"]
            loss = loss_at(step)
            value = float(loss.detach())
            _check_finite("loss", value, step, checkpoints)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(values, schedule.clip_norm)
            # Checked before the step: a finite loss can have a gradient that would ruin the weights.
            _check_finite("norm of the gradient", float(norm), step, checkpoints)
            optimizer.step()
            # Now and not before the next gradient, so that the next forward pass has their memory.
            optimizer.zero_grad(set_to_none=True)
            taken = step + 1
            if schedule.ema_decay:
                # A short run would otherwise average in its first, untrained weights.
                decay = min(schedule.ema_decay, taken / (10 + step))
                with torch.no_grad():
                    torch._foreach_lerp_(average, list[torch.Tensor](values), 1 - decay)
            if on_step is not None:
                on_step(step, value)
            harm = None
            if checks is not None and taken % checks.every == 0:
                with _swapped(values, average):
                    harm = checks.harm(taken)
                done = checks.met(harm)
            due = taken % schedule.checkpoint_every == 0 or taken == schedule.steps
            if checkpoints is not None and (due or harm is not None or stopping()):
                checkpoints.write(taken, run, _state(parameters, optimizer, average), harm=harm)
    with torch.no_grad():
        for item, mean in zip(values, average, strict=bool(average)):
            item.copy_(mean)
    return taken


@contextmanager
def _swapped(values: list[nn.Parameter], average: list[torch.Tensor]) -> Iterator[None]:
    """Have the averages in the model, and what was there in their place."""

    def swap() -> None:
        with torch.no_grad():
            for item, mean in zip(values, average, strict=bool(average)):
                before = item.clone()
                item.copy_(mean)
                mean.copy_(before)

    swap()
    try:
        yield
    finally:
        swap()


def _check_finite(what: str, value: float, step: int, checkpoints: Checkpoints | None) -> None:
    if not math.isfinite(value):
        saved = checkpoints.paths() if checkpoints is not None else []
        raise ToolchainError(
            f"the {what} became {value} at step {step}; start again with a lower learning rate"
            + (f" ({saved[-1]} holds the last state that was saved)" if saved else "")
        )


_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def _state(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, average: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    tensors = {}
    for index, (name, item) in enumerate(parameters.items()):
        tensors[f"value/{name}"] = item.detach()
        # A parameter the loss does not depend on has no moments.
        for moment, value in optimizer.state.get(item, {}).items():
            tensors[f"{moment}/{name}"] = value
        if average:
            tensors[f"average/{name}"] = average[index]
    return tensors


@torch.no_grad()
def _load_(
    stored: Checkpoint,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    average: list[torch.Tensor],
) -> None:
    for index, (name, item) in enumerate(parameters.items()):
        item.copy_(stored.get(f"value/{name}"))
        if f"step/{name}" in stored.names:
            optimizer.state[item] = {
                moment: stored.get(f"{moment}/{name}").to(item.device) for moment in _MOMENTS
            }
        if average:
            average[index].copy_(stored.get(f"average/{name}"))


def _check_run(stored: Checkpoint, now: dict[str, Any], schedule: Schedule) -> None:
    """A run may be made longer, or its cooldown another, if its rates so far stay what they were."""
    step = stored.step
    old, new = dict(stored.run), dict(now)
    planned = Schedule(**old.pop("schedule"))
    del new["schedule"]
    old |= asdict(replace(planned, steps=0, cooldown=0, checkpoint_every=0))
    new |= asdict(replace(schedule, steps=0, cooldown=0, checkpoint_every=0))
    differing = [
        _difference(key, json.dumps(old.get(key)), json.dumps(new.get(key)))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if any(planned.rate_at(index) != schedule.rate_at(index) for index in range(step)):
        differing.append(
            f"it was to have {planned.steps} steps and now {schedule.steps} (cooldown {planned.cooldown} and "
            f"{schedule.cooldown}), and has taken {step}, some of them at other rates than now asked for"
        )
    if differing:
        raise ToolchainError(
            f"the checkpoint {stored.path} belongs to another training: {'; '.join(differing)}. "
            "Remove it, name another, or ask for what it was made with"
        )


def _difference(key: str, before: str, now: str) -> str:
    return f"{key} was {before} and is {now}" if len(before + now) <= 80 else f"{key} was another"


@torch.no_grad()
def take_(model: nn.Module, path: Path) -> int:
    """Have a model be what it was at a checkpoint of its training, and say after how many steps that was."""
    with open_checkpoint(path) as stored:
        for name, item in model.named_parameters():
            if f"value/{name}" in stored.names:
                averaged = f"average/{name}" in stored.names
                item.copy_(stored.get(f"{'average' if averaged else 'value'}/{name}"))
        return stored.step
