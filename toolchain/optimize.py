"""The optimisation loop that every training in the project runs through: resumable, exact, pickle-free."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn


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


def optimize_(
    model: nn.Module,
    loss_at: Callable[[int], torch.Tensor],
    schedule: Schedule,
    *,
    checkpoint: Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """Train a model's unfrozen parameters in place with AdamW.

    Args:
        model: Its parameters with `requires_grad` are trained and, with EMA, replaced by their average.
        loss_at: The loss of a step. A run resumes exactly if this depends on the step alone, so it
            should draw its batch from a generator seeded with the step's number.
        schedule: How long and how fast.
        checkpoint: Where the state lies between steps: continued from if it is there, updated by
            writing beside it and renaming, removed by nobody.
        on_step: Called with the step's number and its loss.

    Raises:
        FloatingPointError: The loss is no longer finite.
    """
    parameters = {name: item for name, item in model.named_parameters() if item.requires_grad}
    values = list(parameters.values())
    optimizer = torch.optim.AdamW(
        values, lr=schedule.learning_rate, weight_decay=schedule.weight_decay, betas=(0.9, 0.99), fused=True
    )
    average = [item.detach().clone() for item in values] if schedule.ema_decay else []
    start = 0
    if checkpoint is not None and checkpoint.exists():
        start = _load_(checkpoint, parameters, optimizer, average)
    for step in range(start, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate_at(step)
        loss = loss_at(step)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss became {value} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(values, schedule.clip_norm)
        optimizer.step()
        if schedule.ema_decay:
            # A short run would otherwise average in its first, untrained weights.
            decay = min(schedule.ema_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(average, list[torch.Tensor](values), 1 - decay)
        if on_step is not None:
            on_step(step, value)
        if checkpoint is not None and (step + 1) % schedule.checkpoint_every == 0:
            _save(checkpoint, step + 1, parameters, optimizer, average)
    if checkpoint is not None and start < schedule.steps:
        _save(checkpoint, schedule.steps, parameters, optimizer, average)
    with torch.no_grad():
        for item, mean in zip(values, average, strict=bool(average)):
            item.copy_(mean)


_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def _save(
    path: Path,
    step: int,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    average: list[torch.Tensor],
) -> None:
    tensors = {}
    for index, (name, item) in enumerate(parameters.items()):
        tensors[f"value/{name}"] = item.detach().contiguous()
        for moment in _MOMENTS:
            tensors[f"{moment}/{name}"] = optimizer.state[item][moment].contiguous()
        if average:
            tensors[f"average/{name}"] = average[index].contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    save_file(tensors, beside, metadata={"step": str(step)})
    beside.replace(path)


def _load_(
    path: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    average: list[torch.Tensor],
) -> int:
    with safe_open(path, framework="pt") as stored, torch.no_grad():
        for index, (name, item) in enumerate(parameters.items()):
            item.copy_(stored.get_tensor(f"value/{name}"))
            optimizer.state[item] = {
                moment: stored.get_tensor(f"{moment}/{name}").to(item.device) for moment in _MOMENTS
            }
            if average:
                average[index].copy_(stored.get_tensor(f"average/{name}"))
        return int(stored.metadata()["step"])
