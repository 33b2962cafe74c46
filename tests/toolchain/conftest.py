"""A tiny Stable Diffusion 3 pipeline with random weights, on disk as any checkpoint is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

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


@pytest.fixture
def tiny(tiny_path: Path) -> Model:
    return open_model(str(tiny_path))


@pytest.fixture(scope="session")
def states(tiny_path: Path) -> States:
    return sample_states(open_model(str(tiny_path)), ["a red circle", "two squares"], seed=0)
