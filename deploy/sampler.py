"""The flow-matching Euler sampler of Stable Diffusion 3 and FLUX.1, in numpy.

Its numbers are those of diffusers' FlowMatchEulerDiscreteScheduler, which a test holds them to.
"""

from __future__ import annotations

import math

from deploy.bundle import Scheduler
from deploy.errors import DeployError, extra

with extra("edge"):
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["euler_step", "sigmas"]

Floats = NDArray[np.float32]


def sigmas(scheduler: Scheduler, num_steps: int, image_seq_len: int) -> tuple[Floats, Floats]:
    """Return the timesteps [num_steps], 0..num_train_timesteps, and the sigmas [num_steps + 1], 1..0.

    Args:
        image_seq_len: Tokens the transformer sees of a picture; matters to dynamic shifting only.
    """
    if num_steps < 1:
        raise DeployError(f"A picture takes one step at least, not {num_steps}.")
    shift = _dynamic_shift(scheduler, image_seq_len) if scheduler.use_dynamic_shifting else scheduler.shift
    num_train = scheduler.num_train_timesteps
    if scheduler.spacing == "unit":
        spacing = np.linspace(1.0, 1 / num_steps, num_steps)
        levels = _shifted(spacing, shift).astype(np.float32)
        return levels * np.float32(num_train), np.append(levels, np.float32(0.0))
    # The range the model was trained on, in float32. With a static shift it comes out shifted, and the
    # spacing below is shifted once more: the model's published pictures are made that way.
    ends: NDArray[np.floating] = np.array([num_train, 1], np.float32) / np.float32(num_train)
    if not scheduler.use_dynamic_shifting:
        ends = _shifted(ends, scheduler.shift)
    first, last = (float(end) for end in ends)
    spacing = np.linspace(first * num_train, last * num_train, num_steps) / num_train
    levels = _shifted(spacing, shift).astype(np.float32)
    return levels * np.float32(num_train), np.append(levels, np.float32(0.0))


def euler_step(latents: Floats, velocity: Floats, sigma: np.float32, next_sigma: np.float32) -> Floats:
    """Return the latents at the next noise level, in float32 whatever the transformer's activations are."""
    return latents + (next_sigma - sigma) * velocity


def _shifted(levels: NDArray[np.floating], shift: float) -> NDArray[np.floating]:
    shifted: NDArray[np.floating] = shift * levels / (1 + (shift - 1) * levels)
    return shifted


def _dynamic_shift(scheduler: Scheduler, image_seq_len: int) -> float:
    """Return the shift for a picture size: more tokens need more noise to hide the same picture."""
    slope = (scheduler.max_shift - scheduler.base_shift) / (
        scheduler.max_image_seq_len - scheduler.base_image_seq_len
    )
    mu = scheduler.base_shift + slope * (image_seq_len - scheduler.base_image_seq_len)
    return math.exp(mu) if scheduler.time_shift_type == "exponential" else mu
