"""Teaching a student to answer as its teacher did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from toolchain.families.sd3 import velocity
from toolchain.families.view import Model
from toolchain.optimize import Schedule, optimize_
from toolchain.trajectories import States


def distill_(
    student: Model,
    states: States,
    schedule: Schedule,
    *,
    batch_size: int,
    seed: int,
    checkpoint: Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """Train a student's unfrozen weights in place to the teacher's velocities (output distillation).

    Matrix products run in bfloat16, the weights and their updates in float32.
    """
    transformer = student.pipeline.transformer

    def loss_at(step: int) -> torch.Tensor:
        rng = np.random.default_rng((seed, step))
        rows = torch.from_numpy(rng.choice(len(states), size=min(batch_size, len(states)), replace=False))
        latents, timesteps, text, target = states.batch(rows)
        with torch.autocast(latents.device.type, torch.bfloat16):
            predicted = velocity(transformer, latents, timesteps, text)
        return F.mse_loss(predicted.float(), target)

    optimize_(transformer, loss_at, schedule, checkpoint=checkpoint, on_step=on_step)
