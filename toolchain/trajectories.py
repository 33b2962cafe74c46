"""States a teacher passes through while it samples: what analysis measures on and distillation trains on.

The velocity a teacher computes at every step of its own sampling is the target of its student there, so
one sampling run gives both the states that matter and what to do in them, and no pictures are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np
import torch

from toolchain.errors import ToolchainError
from toolchain.families.mmdit import TextStates
from toolchain.families.view import Model
from toolchain.prefix import digest, lent
from toolchain.processes import processes


@dataclass(frozen=True, kw_only=True)
class States:
    """States of sampling in random order, each with the teacher's velocity.

    Under classifier-free guidance every state is there twice, in adjacent rows: first with the empty prompt,
    then with its own. Text states are stored once a prompt; `prompt_index` says which one a row is of.
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
    guidance_scale: float | None
    """Of classifier-free guidance; None where there is none."""
    fixed: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def copies(self) -> int:
        """Rows a state takes."""
        return 1 if self.guidance_scale is None else 2

    def batches(self, size: int) -> Iterator[slice]:
        """All rows in order, about `size` at a time, no state torn apart."""
        step = max(self.copies, size - size % self.copies)
        return (slice(start, start + step) for start in range(0, len(self), step))

    def followed(self, velocities: torch.Tensor) -> torch.Tensor:
        """What the sampler follows of the velocities of some rows: one velocity a state.

        Guidance takes what the prompt changes times its scale, and with it whatever error the two rows do not
        have in common: an error that both make alike counts a single time.
        """
        if self.guidance_scale is None:
            return velocities
        free, asked = velocities[0::2], velocities[1::2]
        return free + self.guidance_scale * (asked - free)

    def digest(self) -> str:
        """Of all there is to learn from."""
        text = [self.prompt_index, self.text.tokens_BTJ, self.text.pooled_BP]
        return digest([self.latents, self.timesteps, self.velocities, *text])

    def rows(self, seed: int, step: int, size: int) -> torch.Tensor:
        """As `Feed` says; no more than there are."""
        rng = np.random.default_rng((seed, step))
        return torch.from_numpy(rng.choice(len(self), size=min(size, len(self)), replace=False))

    def batch(
        self,
        rows: slice | torch.Tensor,
        draw: tuple[int, int] = (0, 0),
        *,
        device: torch.device | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, TextStates, torch.Tensor]:
        """Latents, timesteps, text and teacher's velocities of some states, on a device if one is named."""
        text = self.text.index(self.prompt_index[rows])
        latents, timesteps, velocities = (
            item[rows].to(device) for item in (self.latents, self.timesteps, self.velocities)
        )
        return latents, timesteps, text if device is None else text.to(device), velocities


def state_bytes(model: Model, num_prompts: int) -> int:
    """Of memory that `sample_states` takes for so many prompts: for what it gives, and again to order it."""
    config, defaults = model.mmdit.transformer.config, model.defaults
    rows = num_prompts * defaults.num_inference_steps * (2 if model.guided else 1)
    tokens = model.mmdit.num_text_tokens(model.pipeline, defaults.max_sequence_length)
    text: int = (num_prompts + 1) * (tokens * config.joint_attention_dim + config.pooled_projection_dim)
    return 2 * rows * (2 * 4 * prod(model.latent_shape) + 4 + 8) + 4 * text


@torch.no_grad()
def sample_states(
    model: Model,
    prompts: list[str],
    *,
    seed: int | tuple[int, ...],
    batch_size: int = 32,
    share: bool = True,
    on_step: Callable[[], None] | None = None,
) -> States:
    """Let a model paint prompts at its own defaults and keep every state it passes through.

    Args:
        model: The teacher.
        prompts: One picture is sampled for each.
        seed: Of the initial noise and of the order of the states.
        batch_size: Pictures sampled at once.
        share: Whether processes share the pictures out, and each gets all states; or this one paints alone.
        on_step: Called after every step of every batch.

    Raises:
        ToolchainError: The model's velocities are not finite.
    """
    pipeline, defaults, mmdit, guided = model.pipeline, model.defaults, model.mmdit, model.guided
    here = processes()
    text = model.encode([*prompts, ""])
    empty = len(prompts)
    shape = (len(prompts), *model.latent_shape)
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))

    def paint(start: int) -> list[tuple[torch.Tensor, ...]]:
        found = []
        index = torch.arange(start, min(start + batch_size, len(prompts)))
        latents = noise[index].to(here.device)
        both = torch.cat([torch.full_like(index, empty), index]) if guided else index
        states = text.index(both).to(here.device)
        scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        mmdit.set_timesteps(scheduler, defaults.num_inference_steps, *model.latent_shape[1:])
        for timestep in scheduler.timesteps:
            doubled = torch.cat([latents, latents]) if guided else latents
            timesteps = timestep.expand(len(doubled)).to(here.device)
            predicted = mmdit.velocity(doubled, timesteps, states).float()
            found.append(
                tuple(_interleaved(item.cpu(), guided) for item in (doubled, timesteps, predicted, both))
            )
            if guided:
                free, asked = predicted.chunk(2)
                predicted = free + defaults.guidance_scale * (asked - free)
            latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
            if on_step is not None:
                on_step()
        return found

    parts: list[tuple[torch.Tensor, ...]] = []
    starts = range(0, len(prompts), batch_size)
    with lent(mmdit.transformer):
        for turn, found in enumerate(here.each(starts, paint) if share else map(paint, starts)):
            parts += found
            if on_step is not None and share and not here.owns(turn):
                for _ in found:
                    on_step()
    if not all(torch.isfinite(predicted).all() for _, _, predicted, _ in parts):
        raise ToolchainError(f"{model.source} gives velocities that are not finite: its weights are damaged")
    all_latents, timesteps, velocities, prompt_index = (
        torch.cat(items) for items in zip(*parts, strict=True)
    )
    parts.clear()
    copies = 2 if guided else 1
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(all_latents) // copies))
    order = (copies * order[:, None] + torch.arange(copies)).flatten()
    return States(
        latents=all_latents[order],
        timesteps=timesteps[order],
        velocities=velocities[order],
        prompt_index=prompt_index[order],
        text=text.to(torch.device("cpu")),
        guidance_scale=defaults.guidance_scale if guided else None,
    )


def _interleaved(rows: torch.Tensor, guided: bool) -> torch.Tensor:
    """The first half of some rows in turn with the second."""
    return torch.stack(rows.chunk(2), dim=1).flatten(0, 1) if guided else rows
