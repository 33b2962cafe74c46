"""Contribution analysis: how much every block matters, by what the model does without it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import SD3Transformer2DModel

from toolchain.families.sd3 import block_parameters, velocity, without_blocks
from toolchain.families.view import Model
from toolchain.plan import BlockSensitivity, Sensitivity
from toolchain.trajectories import States


def analyze(
    model: Model, states: States, *, seed: int, on_block: Callable[[], None] | None = None
) -> Sensitivity:
    """Measure the harm of removing each block alone, on the teacher's own states."""
    transformer = model.pipeline.transformer
    parameters = block_parameters(transformer)
    blocks = []
    for index, count in enumerate(parameters):
        errors = velocity_errors(without_blocks(transformer, [index]), states)
        blocks.append(
            BlockSensitivity(
                block=index,
                harm=float(errors.mean()),
                standard_error=float(errors.std() / len(errors) ** 0.5),
                num_parameters=count,
            )
        )
        if on_block is not None:
            on_block()
    return Sensitivity(
        model=model.source,
        total_parameters=model.num_parameters,
        num_states=len(states),
        seed=seed,
        blocks=tuple(blocks),
    )


@torch.no_grad()
def velocity_errors(
    transformer: SD3Transformer2DModel, states: States, *, batch_size: int = 64
) -> torch.Tensor:
    """|v - v_teacher|^2 / |v_teacher|^2 of every state, [states]."""
    errors = []
    for start in range(0, len(states), batch_size):
        latents, timesteps, text, target = states.batch(slice(start, start + batch_size))
        wrong = (velocity(transformer, latents, timesteps, text) - target).flatten(1)
        errors.append(wrong.square().sum(1) / target.flatten(1).square().sum(1))
    return torch.cat(errors)
