"""Tiny pipelines of each family with random weights, on disk as any checkpoint is."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from hypothesis import HealthCheck, settings
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, T5Tokenizer

from toolchain.families import GenerationDefaults, Model, open_model
from toolchain.families.view import save_model
from toolchain.shapes.model import ShapesConfig, build_pipeline, build_tokenizer, build_vae
from toolchain.trajectories import States, sample_states

# A test says what is right, not how fast a machine is.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

_LONG = ("test_end_to_end.py", "test_launch.py", "test_processes.py", "test_damaged.py", "test_bundle.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first, or one process would be at the last of them alone."""
    items.sort(key=lambda item: _LONG.index(item.path.name) if item.path.name in _LONG else len(_LONG))


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One for this run, which leaves the user's alone; every process that runs tests shares it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPTOOL_CACHE", str(shared / "cache"))
        yield


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
    save_model(model, path)
    return path


@pytest.fixture(scope="session")
def tiny_sd35_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of SD3.5's layout: three text encoders, T5 among them, in bfloat16, and no notes of ours."""
    config = ShapesConfig(num_layers=6, text_layers=2, vae_channels=(8, 8, 8, 8), num_attention_heads=1)
    pipeline = build_pipeline(config)
    nn.init.normal_(pipeline.transformer.proj_out.weight, std=0.05)
    t5, tokenizer = tiny_t5(pipeline.transformer.config.joint_attention_dim)
    parts = pipeline.components | {"text_encoder_3": t5, "tokenizer_3": tokenizer}
    path = tmp_path_factory.mktemp("models") / "sd35"
    StableDiffusion3Pipeline(**parts).to(torch.bfloat16).save_pretrained(path)
    return path


def tiny_t5(width: int) -> tuple[T5EncoderModel, T5Tokenizer]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -3.0) for letter in "▁abcdefghi")]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config), tokenizer


@pytest.fixture(scope="session")
def tiny_dual_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of SD3.5-Medium's blocks: the first ones attend to the picture a second time."""
    config = ShapesConfig(num_layers=1, text_layers=2, vae_channels=(8, 8, 8, 8))
    pipeline = build_pipeline(config)
    transformer = SD3Transformer2DModel.from_config(
        pipeline.transformer.config, num_layers=4, dual_attention_layers=(0, 1), attention_head_dim=16,
        caption_projection_dim=32,
    )  # fmt: skip
    parts = pipeline.components | {"transformer": randomized(transformer)}
    return saved(StableDiffusion3Pipeline(**parts), tmp_path_factory.mktemp("models") / "dual")


@pytest.fixture(scope="session")
def tiny_flux_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of FLUX.1-schnell's layout, in bfloat16."""
    tokenizer = build_tokenizer(16)
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, projection_dim=16,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    t5, t5_tokenizer = tiny_t5(24)
    transformer = FluxTransformer2DModel(
        in_channels=32, num_layers=2, num_single_layers=3, num_attention_heads=2, attention_head_dim=16,
        joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    pipeline = FluxPipeline(
        transformer=randomized(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=build_vae(ShapesConfig(vae_channels=(8, 8, 8, 8))),
        text_encoder=CLIPTextModel(clip),
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
    )
    path = tmp_path_factory.mktemp("models") / "flux"
    return saved(pipeline, path, guidance_scale=0.0, max_sequence_length=8)


def randomized(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module


def saved(pipeline: object, path: Path, *, guidance_scale: float = 3.0, max_sequence_length: int = 0) -> Path:
    path.mkdir()
    defaults = GenerationDefaults(
        num_inference_steps=2,
        guidance_scale=guidance_scale,
        max_sequence_length=max_sequence_length,
        height=64,
        width=64,
    )
    save_model(
        Model(
            source=path.name,
            path=path,
            pipeline=pipeline,
            stored_dtype=torch.bfloat16,
            defaults=defaults,
            world=None,
        ),
        path,
    )
    return path


@pytest.fixture(params=["tiny_path", "tiny_dual_path", "tiny_flux_path"])
def any_path(request: pytest.FixtureRequest) -> Path:
    """One of each kind of blocks."""
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture
def tiny(tiny_path: Path) -> Model:
    return open_model(str(tiny_path))


@pytest.fixture(scope="session")
def states(tiny_path: Path) -> States:
    return sample_states(open_model(str(tiny_path)), ["a red circle", "two squares"], seed=0)


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `private.pem`, the same encrypted, and `public.pem`; and a stranger's pair."""
    directory = tmp_path_factory.mktemp("keys")
    for prefix in ("", "strangers-"):
        key = ec.generate_private_key(ec.SECP256R1())
        form = Encoding.PEM, PrivateFormat.PKCS8
        (directory / f"{prefix}private.pem").write_bytes(key.private_bytes(*form, NoEncryption()))
        (directory / f"{prefix}encrypted.pem").write_bytes(
            key.private_bytes(*form, BestAvailableEncryption(b"secret"))
        )
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (directory / f"{prefix}public.pem").write_bytes(public)
    return directory


_TENSORRT = """import tensorrt_rtx

globals().update({name: value for name, value in vars(tensorrt_rtx).items() if not name.startswith("__")})
__version__ = "10.16.0"
"""


@pytest.fixture
def tensorrt(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """TensorRT-RTX in TensorRT's place, under its name and with a version as it has.

    The two share their interface, and TensorRT itself builds nothing without a GPU.
    """
    pytest.importorskip("tensorrt_rtx")
    directory = tmp_path_factory.mktemp("tensorrt")
    (directory / "tensorrt.py").write_text(_TENSORRT)
    monkeypatch.setenv("PYTHONPATH", str(directory))
    monkeypatch.syspath_prepend(directory)
    yield
    sys.modules.pop("tensorrt", None)
