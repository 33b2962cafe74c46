"""How far sampling goes astray: latents of a graph and of torch, step by step from the same noise.

Errors of one step are what parity is about; this is what becomes of them over a whole picture. It takes the
transformer in memory, so it is for models that fit there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from export.blockwise import encode_prompts
from export.errors import ExportError
from toolchain.families import Model
from toolchain.families.mmdit import TextStates

__all__ = ["LARGEST", "Drift", "measure_drift"]

LARGEST = 100_000_000
"""Parameters of a transformer that are held in float32, and sampled with, for the sake of a comparison."""

_LARGEST_SIDE = 32
"""Of the latents: larger pictures say no more and take far longer."""

_PROMPTS = ("a red circle left of a blue square", "three yellow triangles")
# Beyond it pictures have nothing in common any more: independent noise is at the square root of 2.
_LIMIT = 1.0


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Of one graph."""

    graph: str
    """Its path in the bundle."""
    errors: list[float]
    """L2 norm of the difference of the latents by that of torch's, after each step of sampling."""


def measure_drift(
    model: Model,
    weights: Mapping[str, torch.Tensor],
    graphs: Mapping[str, Path],
    *,
    on_step: Callable[[], None] = lambda: None,
    seed: int = 0,
) -> list[Drift]:
    """Sample with torch and with each graph, as the model is run by default.

    Args:
        model: Its parts may lie on the meta device.
        weights: Of the transformer.
        graphs: Where they lie, by their paths in the bundle.
        on_step: Called after each step of each.
        seed: Of the noise.

    Raises:
        ExportError: The pictures have nothing in common.
    """
    transformer = copy.deepcopy(model.pipeline.transformer)
    transformer.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    view = model.mmdit
    loaded = type(view)(
        transformer, guidance_scale=view.guidance_scale, vae_scale_factor=view.vae_scale_factor
    )
    prompts = [*_PROMPTS, *([""] * len(_PROMPTS) if model.guided else [])]
    text = encode_prompts(model, prompts)
    largest = min(_LARGEST_SIDE, view.max_latent_size)
    channels, *sides = model.latent_shape
    shape = (len(_PROMPTS), channels, *(min(side, largest) for side in sides))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        exact = _sampled(model, lambda latents, times: loaded.velocity(latents, times, text), noise, on_step)
        found = []
        for name, path in graphs.items():
            velocity = _velocity_of(path, text, model)
            states = _sampled(model, velocity, noise, on_step)
            errors = [
                float((state - right).norm() / right.norm())
                for state, right in zip(states, exact, strict=True)
            ]
            if not errors[-1] <= _LIMIT:
                raise ExportError(
                    f"The pictures of the exported transformer ({name}) have nothing in common with those of "
                    f"the model: their latents end {errors[-1]:.3g} apart, relative to the model's. Nothing "
                    "was written; keep more bits with --bits 8, or calibrate."
                )
            found.append(Drift(graph=name, errors=errors))
    return found


def _sampled(
    model: Model,
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noise: torch.Tensor,
    on_step: Callable[[], None],
) -> list[torch.Tensor]:
    """Latents after each step."""
    scheduler = type(model.pipeline.scheduler).from_config(model.pipeline.scheduler.config)
    model.mmdit.set_timesteps(scheduler, model.defaults.num_inference_steps, *noise.shape[2:])
    latents, states = noise, []
    for timestep in scheduler.timesteps:
        doubled = torch.cat([latents, latents]) if model.guided else latents
        predicted = velocity(doubled, timestep.expand(len(doubled)))
        if model.guided:
            asked, free = predicted.chunk(2)
            predicted = free + model.defaults.guidance_scale * (asked - free)
        latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
        states.append(latents)
        on_step()
    return states


def _velocity_of(
    path: Path, text: TextStates, model: Model
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A graph as onnxruntime runs it on a device."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    types = {
        value.name: np.float16 if "float16" in value.type else np.float32 for value in session.get_inputs()
    }

    def velocity(latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        feeds = {
            "hidden_states": latents,
            "timestep": timesteps,
            "encoder_hidden_states": text.tokens_BTJ,
            "pooled_projections": text.pooled_BP,
            "guidance": torch.full((len(latents),), model.mmdit.guidance_scale),
        }
        arrays = {name: feeds[name].numpy().astype(kind, copy=False) for name, kind in types.items()}
        (found,) = session.run(["velocity"], arrays)
        return torch.from_numpy(found.astype(np.float32, copy=False))

    return velocity
