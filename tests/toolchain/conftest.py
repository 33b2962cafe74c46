"""A tiny Stable Diffusion 3 pipeline with random weights, on disk as any checkpoint is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from toolchain.families import GenerationDefaults, Model, open_model
from toolchain.families.view import save_model_
from toolchain.shapes.model import ShapesConfig, build_pipeline
from toolchain.trajectories import States, sample_states


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ShapesConfig(num_layers=6, text_layers=2, vae_channels=(8, 8, 8, 8), num_attention_heads=1)
    pipeline = build_pipeline(config)
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        for parameter in part.parameters():
            nn.init.normal_(parameter, std=0.05)
    path = tmp_path_factory.mktemp("models") / "tiny"
    path.mkdir()
    model = Model(
        source="tiny",
        path=path,
        pipeline=pipeline,
        stored_dtype=torch.float16,
        defaults=GenerationDefaults(
            num_inference_steps=2, guidance_scale=3.0, max_sequence_length=0, height=64, width=64
        ),
        world="shapes",
    )
    save_model_(model, path)
    return path


@pytest.fixture(scope="session")
def tiny_sd35_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of SD3.5's layout: three text encoders, T5 among them, in bfloat16, and no notes of ours."""
    config = ShapesConfig(num_layers=6, text_layers=2, vae_channels=(8, 8, 8, 8), num_attention_heads=1)
    pipeline = build_pipeline(config)
    nn.init.normal_(pipeline.transformer.proj_out.weight, std=0.05)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -3.0) for letter in "▁abcdefghi")]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    width = pipeline.transformer.config.joint_attention_dim
    t5 = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    parts = pipeline.components | {"text_encoder_3": T5EncoderModel(t5), "tokenizer_3": tokenizer}
    path = tmp_path_factory.mktemp("models") / "sd35"
    StableDiffusion3Pipeline(**parts).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture
def tiny(tiny_path: Path) -> Model:
    return open_model(str(tiny_path))


@pytest.fixture(scope="session")
def states(tiny_path: Path) -> States:
    return sample_states(open_model(str(tiny_path)), ["a red circle", "two squares"], seed=0)
