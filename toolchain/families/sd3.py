"""Stable Diffusion 3 and 3.5: its blocks, how to take some out, and how to call it.

Shapes are written B batch, C channels, H and W latent height and width, T text tokens, J joint width,
P pooled width.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import nn


@dataclass(frozen=True, kw_only=True)
class TextStates:
    """What the text encoders make of a list of prompts."""

    tokens_BTJ: torch.Tensor
    pooled_BP: torch.Tensor


def encode_prompts(
    pipeline: StableDiffusion3Pipeline, prompts: list[str], max_sequence_length: int
) -> TextStates:
    """Encode prompts as the pipeline does for itself."""
    with torch.no_grad():
        tokens, _, pooled, _ = pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
        )
    return TextStates(tokens_BTJ=tokens, pooled_BP=pooled)


def velocity(
    transformer: SD3Transformer2DModel,
    latents_BCHW: torch.Tensor,
    timesteps_B: torch.Tensor,
    text: TextStates,
) -> torch.Tensor:
    """The transformer's velocity [B, C, H, W]; timesteps run from 0 (clean) to 1000 (noise)."""
    output: torch.Tensor = transformer(
        hidden_states=latents_BCHW,
        timestep=timesteps_B,
        encoder_hidden_states=text.tokens_BTJ,
        pooled_projections=text.pooled_BP,
        return_dict=False,
    )[0]
    return output


def block_parameters(transformer: SD3Transformer2DModel) -> list[int]:
    """Number of parameters of every block."""
    return [sum(item.numel() for item in block.parameters()) for block in transformer.transformer_blocks]


def without_blocks(transformer: SD3Transformer2DModel, removed: Collection[int]) -> SD3Transformer2DModel:
    """A transformer without some of its blocks, the rest renumbered; it shares all its weights.

    Removing a block lets both streams pass by it: every sub-block is a residual. A student that is to
    be saved keeps the last block, since diffusers builds the last one without a text stream.
    """
    num_layers = len(transformer.transformer_blocks)
    kept = [index for index in range(num_layers) if index not in removed]
    student = copy.copy(transformer)
    student._modules = {**transformer._modules}
    student.transformer_blocks = nn.ModuleList(transformer.transformer_blocks[index] for index in kept)
    dual = transformer.config.dual_attention_layers
    student.register_to_config(
        num_layers=len(kept),
        dual_attention_layers=tuple(new for new, old in enumerate(kept) if old in dual),
    )
    return student
