"""A tiny model on disk and its exported bundles, made once: tracing is slow."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from deploy.bundle import Bundle
from export.bundle import export_bundle
from export.cache import ComponentCache
from export.denoiser import LoweredTransformer, lower_transformer
from profiles.schema import Profile, load_profile
from toolchain.families import GenerationDefaults, Model, open_model
from toolchain.families.view import save_model
from toolchain.shapes.model import GENERATION_DEFAULTS, ShapesConfig, build_pipeline


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of width 64, with weights that make every part of them matter."""
    config = ShapesConfig(num_layers=2, text_layers=2, vae_channels=(8, 8, 8, 8), num_attention_heads=1)
    pipeline = build_pipeline(config)
    torch.manual_seed(0)
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae):
        for parameter in part.parameters():
            nn.init.normal_(parameter, std=0.05)
    path = tmp_path_factory.mktemp("models") / "tiny"
    path.mkdir()
    model = Model(
        source="tiny",
        path=path,
        pipeline=pipeline,
        stored_dtype=torch.float32,
        defaults=GenerationDefaults(**GENERATION_DEFAULTS),
        world=None,
    )
    save_model(model, path)
    (path / "LICENSE").write_text("Do what you like.")
    return path


@pytest.fixture(scope="session")
def model(path: Path) -> Model:
    """With its weights, to compare with."""
    return open_model(str(path))


@pytest.fixture(scope="session")
def on_disk(path: Path) -> Model:
    """Without them, as it is exported."""
    return open_model(str(path), precision="none")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ComponentCache:
    """Shared by all exports of the session."""
    return ComponentCache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def lowered(on_disk: Model) -> LoweredTransformer:
    """The transformer in float32."""
    return lower_transformer(on_disk.mmdit, on_disk.weights("transformer"))


@pytest.fixture(scope="session")
def gpu() -> Profile:
    """A target that computes in float16; it gets an engine where TensorRT-RTX is installed to build one."""
    profile = load_profile("rtx4090")
    if importlib.util.find_spec("tensorrt_rtx") is None:
        return dataclasses.replace(profile, runtimes=("onnxruntime-cuda",))
    return profile


@pytest.fixture(scope="session")
def gpus(gpu: Profile) -> list[Profile]:
    """Targets of three generations that compute as `gpu` does, and one whose engine is built on itself."""
    others = [load_profile("rtx3060-12gb"), load_profile("rtx5090")]
    others = [dataclasses.replace(other, runtimes=gpu.runtimes) for other in others]
    return [others[0], gpu, others[1], load_profile("h100")]


@pytest.fixture(scope="session")
def bundle(
    on_disk: Model, gpus: list[Profile], cache: ComponentCache, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """The model in 4 bits."""
    output = tmp_path_factory.mktemp("int4") / "bundle"
    return export_bundle(on_disk, targets=gpus, output=output, cache=cache, license="mit")


@pytest.fixture(scope="session")
def full_bundle(on_disk: Model, cache: ComponentCache, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The model in 32 bits."""
    output = tmp_path_factory.mktemp("full") / "bundle"
    return export_bundle(on_disk, targets=[load_profile("cpu-x86")], output=output, bits=32, cache=cache)
