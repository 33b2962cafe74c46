"""The untrained `shapes` pipeline: every part of Stable Diffusion 3, only small.

Also what the tests use at a few kilobytes, with random weights, to stand for any SD3-type checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from toolchain.shapes import world

# Generation settings that differ from the pipeline's own; written beside it and read by every command.
# There is no T5, so there are no T5 tokens to pad with.
GENERATION_DEFAULTS: dict[str, Any] = {
    "num_inference_steps": 12,
    "guidance_scale": 3.0,
    "max_sequence_length": 0,
    "height": world.IMAGE_SIZE,
    "width": world.IMAGE_SIZE,
}


@dataclass(frozen=True, kw_only=True)
class ShapesConfig:
    """Sizes of the pipeline's parts; the defaults are those of the model that comes with the tool."""

    num_layers: int = 16
    num_attention_heads: int = 2
    attention_head_dim: int = 64
    patch_size: int = 2
    text_widths: tuple[int, int] = (64, 128)
    """Hidden size of the first and the second CLIP text encoder."""
    text_layers: int = 3
    vae_channels: tuple[int, ...] = (16, 32, 64, 64)
    latent_channels: int = 8
    num_tokens: int = 16
    """Length of a padded caption, start and end tokens included."""
    shift: float = 3.0
    """Shift of the sigma schedule towards noise, as SD3's."""


def build_pipeline(config: ShapesConfig, *, seed: int = 0) -> StableDiffusion3Pipeline:
    """Build the pipeline with fresh weights, in float32 on the CPU."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(config.num_tokens)
    text_width = sum(config.text_widths)
    width = config.num_attention_heads * config.attention_head_dim
    vae = build_vae(config)
    sample_size = world.IMAGE_SIZE // 2 ** (len(config.vae_channels) - 1)
    transformer = SD3Transformer2DModel(
        sample_size=sample_size,
        patch_size=config.patch_size,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        num_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        caption_projection_dim=width,
        joint_attention_dim=text_width,
        pooled_projection_dim=text_width,
        pos_embed_max_size=2 * sample_size // config.patch_size,
        qk_norm="rms_norm",
    )
    _initialize_adaln_zero_(transformer)
    first, second = (_build_text_encoder(config, tokenizer, size) for size in config.text_widths)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=config.shift),
        vae=vae,
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=build_tokenizer(config.num_tokens),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def build_tokenizer(num_tokens: int) -> CLIPTokenizer:
    """Learn CLIP's byte-pair encoding on the captions, so that each of their words is one token."""
    stream = world.captions(held_out=False, seed=0)
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=512, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator((next(stream).text for _ in range(4000)), trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["".join(pair) for pair in merges]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *words]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        model_max_length=num_tokens,
    )


def build_vae(config: ShapesConfig) -> AutoencoderKL:
    """Build SD3's kind of autoencoder: 16-bit-safe groups, a shift as well as a scale, no quant convs."""
    num_levels = len(config.vae_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * num_levels,
        up_block_types=("UpDecoderBlock2D",) * num_levels,
        block_out_channels=config.vae_channels,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=8,
        sample_size=world.IMAGE_SIZE,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def _build_text_encoder(
    config: ShapesConfig, tokenizer: CLIPTokenizer, width: int
) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=max(1, width // 32),
            max_position_embeddings=config.num_tokens,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _initialize_adaln_zero_(transformer: SD3Transformer2DModel) -> None:
    """Start as DiT does (https://arxiv.org/abs/2212.09748): Xavier linears, every block the identity."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and (name.endswith(".linear") or name == "proj_out"):
            nn.init.zeros_(module.weight)
