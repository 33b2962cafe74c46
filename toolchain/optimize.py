"""The optimisation loop that every training in the project runs through: resumable, exact, pickle-free."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolchain import interrupts
from toolchain.checkpoints import Checkpoint, Checkpoints, in_file_order, open_checkpoint
from toolchain.errors import ToolchainError
from toolchain.processes import processes
from toolchain.together import fill_, whole


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
    parts: int = 1,
    holding: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> int:
    """Train a model's unfrozen parameters in place with AdamW.

    A signal to end is held back until the step is taken and, where there are checkpoints, saved. Several
    processes train together if the gradients they get are the same, or shares of the same ones.

    Args:
        model: Its parameters with `requires_grad` are trained and, with EMA, replaced by their average.
        loss_at: The loss of a step; of one in several parts that of a part, which are numbered on from step
            to step. A run resumes exactly if this depends on the number alone, so it should draw its batch
            from a generator seeded with that.
        schedule: How long and how fast.
        strength: By name of parameter, the share of the learning rate it is trained with; 1 for what is not
            named. The rate is scaled and not the gradient, for AdamW divides by the gradient's own size:
            its updates are the same whatever a gradient is multiplied by.
        belongs_to: What else the run depends on, as JSON takes it; a checkpoint of another run is refused.
        checkpoints: Where the state lies between steps: the last one is continued from.
        checks: Looks at the model from time to time, and may find that it suffices.
        on_step: Called with the step's number and its loss, the mean over parts and processes.
        parts: Of a step, whose gradients are averaged.
        holding: Entered for each part of a step but the last.

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
    taken, done, stop = 0, False, False
    if checkpoints is not None:
        taken, harm = _resume_(checkpoints, run, schedule, parameters, optimizer, average)
        done = checks is not None and checks.met(harm)
    with interrupts.held() as stopping:
        for step in range(taken, schedule.steps):
            if done or stop:
                break
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate_at(step) * group["strength"]
            value = 0.0
            for part in range(parts):
                with holding() if part < parts - 1 else nullcontext():
                    loss = loss_at(parts * step + part) / parts
                    value += float(loss.detach())
                    loss.backward()  # type: ignore[no-untyped-call]
            everyone = processes().gather((value, stopping()))
            value, stop = sum(each for each, _ in everyone) / len(everyone), any(it for _, it in everyone)
            _check_finite("loss", value, step, checkpoints)
            norm = whole(nn.utils.clip_grad_norm_(values, schedule.clip_norm))
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
            if checkpoints is not None and (due or harm is not None or stop):
                _write(checkpoints, taken, run, _state(parameters, optimizer, average), harm)
    if stop:  # by a signal that another process was sent
        raise interrupts.Stopped(signal.SIGTERM)
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


def _write(
    checkpoints: Checkpoints,
    step: int,
    run: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    harm: float | None,
) -> None:
    here = processes()
    if here.is_first:
        checkpoints.write(step, run, tensors, harm=harm, whole=whole)
    else:
        for _, item in in_file_order(tensors):
            whole(item)
    here.gather(None)  # Its patience is longer than that of the next exchange of gradients.


def _resume_(
    checkpoints: Checkpoints,
    run: dict[str, Any],
    schedule: Schedule,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    average: list[torch.Tensor],
) -> tuple[int, float | None]:
    """Take the state from the last checkpoint, if there is one; steps taken and the harm found there."""

    def look() -> tuple[Path, int, float | None, frozenset[str]] | None:
        with checkpoints.latest() as found:
            if found is None:
                return None
            _check_run(found, run, schedule)
            return found.path, found.step, found.harm, found.names

    known = processes().first(look)
    if known is None:
        return 0, None
    path, step, harm, names = known
    targets: dict[str, torch.Tensor] = {}
    for index, (name, item) in enumerate(parameters.items()):
        targets[f"value/{name}"] = item
        if f"step/{name}" in names:
            state = {
                moment: torch.zeros_like(item, requires_grad=False) for moment in ("exp_avg", "exp_avg_sq")
            }
            optimizer.state[item] = state | {"step": torch.zeros((), device=item.device)}
            targets |= {f"{moment}/{name}": value for moment, value in optimizer.state[item].items()}
        if average:
            targets[f"average/{name}"] = average[index]
    _fill_all_(targets, path)
    return step, harm


def _fill_all_(targets: dict[str, torch.Tensor], path: Path) -> None:
    """Fill tensors from a checkpoint, which the first process reads for all."""
    with open_checkpoint(path) if processes().is_first else nullcontext() as stored:
        for name, item in targets.items():
            fill_(item, None if stored is None else stored.get(name))


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


def take_(model: nn.Module, path: Path) -> int:
    """Have a model be what it was at a checkpoint of its training, and say after how many steps that was."""

    def look() -> tuple[int, frozenset[str]]:
        with open_checkpoint(path) as stored:
            return stored.step, stored.names

    step, names = processes().first(look)
    kinds = {
        name: "average" if f"average/{name}" in names else "value" for name, _ in model.named_parameters()
    }
    stored = {f"{kinds[name]}/{name}": item for name, item in model.named_parameters()}
    _fill_all_({name: item for name, item in stored.items() if name in names}, path)
    return step
