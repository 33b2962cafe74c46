"""States a teacher passes through while it samples: what analysis measures on and distillation trains on.

The velocity a teacher computes at every step of its own sampling is the target of its student there, so
one sampling run gives both the states that matter and what to do in them, and no pictures are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from toolchain.errors import ToolchainError
from toolchain.families.mmdit import TextStates
from toolchain.families.view import Model


@dataclass(frozen=True, kw_only=True)
class States:
    """States of sampling in random order, each with the teacher's velocity.

    Text states are stored once a prompt; `prompt_index` says which one a state was sampled for.
    """

    latents: torch.Tensor
    """float32 [states, channels, height, width]"""
    timesteps: torch.Tensor
    """float32 [states], 0 (clean) to 1000 (noise)"""
    velocities: torch.Tensor
    """float32, shaped as `latents`"""
    prompt_index: torch.Tensor
    """int64 [states]"""
    text: TextStates
    """Of every distinct prompt."""

    def __len__(self) -> int:
        return len(self.latents)

    def batch(
        self, rows: slice | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, TextStates, torch.Tensor]:
        """Latents, timesteps, text and teacher's velocities of some states."""
        index = self.prompt_index[rows]
        return self.latents[rows], self.timesteps[rows], self.text.index(index), self.velocities[rows]


@torch.no_grad()
def sample_states(
    model: Model,
    prompts: list[str],
    *,
    seed: int,
    batch_size: int = 32,
    on_step: Callable[[], None] | None = None,
) -> States:
    """Let a model paint prompts at its own defaults and keep every state it passes through.

    With guidance each state is kept twice, once with its prompt and once with the empty one, for the
    student is asked both.

    Args:
        model: The teacher.
        prompts: One picture is sampled for each.
        seed: Of the initial noise and of the order of the states.
        batch_size: Pictures sampled at once.
        on_step: Called after every step of every batch.

    Raises:
        ToolchainError: The model's velocities are not finite.
    """
    pipeline, defaults, mmdit, guided = model.pipeline, model.defaults, model.mmdit, model.guided
    text = mmdit.encode_prompts(pipeline, [*prompts, ""], defaults.max_sequence_length)
    empty = len(prompts)
    shape = (len(prompts), *model.latent_shape)
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))
    parts: list[tuple[torch.Tensor, ...]] = []
    for start in range(0, len(prompts), batch_size):
        index = torch.arange(start, min(start + batch_size, len(prompts)))
        latents = noise[index]
        both = torch.cat([torch.full_like(index, empty), index]) if guided else index
        states = text.index(both)
        scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        mmdit.set_timesteps(scheduler, defaults.num_inference_steps, *model.latent_shape[1:])
        for timestep in scheduler.timesteps:
            doubled = torch.cat([latents, latents]) if guided else latents
            timesteps = timestep.expand(len(doubled))
            predicted = mmdit.velocity(doubled, timesteps, states)
            parts.append((doubled, timesteps, predicted, both))
            if guided:
                free, asked = predicted.chunk(2)
                predicted = free + defaults.guidance_scale * (asked - free)
            latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
            if on_step is not None:
                on_step()
    if not all(torch.isfinite(predicted).all() for _, _, predicted, _ in parts):
        raise ToolchainError(f"{model.source} gives velocities that are not finite: its weights are damaged")
    columns = (torch.cat(items) for items in zip(*parts, strict=True))
    all_latents, timesteps, velocities, prompt_index = columns
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(all_latents)))
    return States(
        latents=all_latents[order],
        timesteps=timesteps[order],
        velocities=velocities[order],
        prompt_index=prompt_index[order],
        text=text,
    )
