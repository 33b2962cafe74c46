"""A tiny model and its exported bundles, made once: tracing is slow, so each module is traced once."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import nn

from deploy.bundle import Bundle
from export import bundle as bundle_module
from export.denoiser import LoweredTransformer, lower_transformer
from export.lower import lower_text_encoder, lower_vae_decoder
from profiles.schema import Profile, load_profile
from toolchain.families import GenerationDefaults, Model
from toolchain.families.mmdit import MMDiT
from toolchain.shapes.model import GENERATION_DEFAULTS, ShapesConfig, build_pipeline

Lower = Callable[..., Any]


@pytest.fixture(scope="session")
def model() -> Model:
    """Two blocks of width 64, with weights that make every part of them matter."""
    config = ShapesConfig(num_layers=2, text_layers=2, vae_channels=(8, 8, 8, 8), num_attention_heads=1)
    pipeline = build_pipeline(config)
    torch.manual_seed(0)
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae):
        part.eval()
        for parameter in part.parameters():
            nn.init.normal_(parameter, std=0.05)
    return Model(
        source="tiny",
        path=Path("tiny"),
        pipeline=pipeline,
        stored_dtype=torch.float32,
        defaults=GenerationDefaults(**GENERATION_DEFAULTS),
        world=None,
    )


@pytest.fixture(scope="session")
def lower() -> Iterator[Lower]:
    """Lower a module, in the exporter too, as a copy of a graph that is traced once."""
    traced: dict[Any, ir.Model | LoweredTransformer] = {}

    def once(function: Lower) -> Lower:
        def call(module: nn.Module | MMDiT, *rest: Any) -> ir.Model | LoweredTransformer:
            whose = module.transformer if isinstance(module, MMDiT) else module
            key = (function, id(whose), *(item for item in rest if isinstance(item, str)))
            if key not in traced:
                traced[key] = function(module, *rest)
            return traced[key].clone()

        return call

    with pytest.MonkeyPatch.context() as patch:
        functions = (lower_transformer, lower_text_encoder, lower_vae_decoder)
        copies = {function.__name__: once(function) for function in functions}
        for name, function in copies.items():
            patch.setattr(bundle_module, name, function)
        yield lambda name, *arguments: copies[name](*arguments)


@pytest.fixture(scope="session")
def gpu() -> Profile:
    """A target that computes in float16; it gets an engine where TensorRT-RTX is installed to build one."""
    profile = load_profile("rtx4090")
    if importlib.util.find_spec("tensorrt_rtx") is None:
        return dataclasses.replace(profile, runtime="onnxruntime", compute_capability=None)
    return profile


@pytest.fixture(scope="session")
def bundle(model: Model, gpu: Profile, lower: Lower, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The model in 4 bits."""
    output = tmp_path_factory.mktemp("int4") / "bundle"
    return bundle_module.export_bundle(model, targets=[gpu], output=output, license="mit")


@pytest.fixture(scope="session")
def full_bundle(model: Model, lower: Lower, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The model in 32 bits."""
    output = tmp_path_factory.mktemp("full") / "bundle"
    return bundle_module.export_bundle(model, targets=[load_profile("cpu-x86")], output=output, bits=32)
