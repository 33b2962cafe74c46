"""Bundles of every family paint what the pipeline of diffusers does, with all of their text encoders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deploy.pipeline import EdgePipeline
from export.bundle import export_bundle
from export.cache import ComponentCache
from profiles.schema import load_profile
from toolchain.families import Model, open_model

PROMPTS = ["a big cab", "a bed"]


def exported(source: Path, output: Path, **options: object) -> tuple[Model, EdgePipeline]:
    """The model with its weights, and its bundle in 32 bits."""
    on_disk = open_model(str(source), precision="none")
    if options.pop("without_t5", False):
        on_disk = on_disk.without_t5()
    export_bundle(
        on_disk,
        targets=[load_profile("cpu-x86")],
        output=output,
        bits=32,
        cache=ComponentCache(output.with_name("cache")),
    )
    return open_model(str(source)), EdgePipeline.open(output, runtime="onnxruntime-cpu")


def both_paint(model: Model, edge: EdgePipeline) -> tuple[np.ndarray, np.ndarray]:
    noise = np.random.default_rng(0).standard_normal((2, *model.latent_shape), np.float32)
    return model.paint(PROMPTS, noise), edge.paint(PROMPTS, noise)


@pytest.mark.parametrize("family", ["tiny_flux_path", "tiny_dual_path"])
def test_the_pictures_are_those_of_diffusers(
    request: pytest.FixtureRequest, tmp_path: Path, family: str
) -> None:
    model, edge = exported(request.getfixturevalue(family), tmp_path / "bundle")
    assert edge.bundle.manifest.architecture.family == model.mmdit.family
    expected, found = both_paint(model, edge)
    assert expected.std() > 1
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


def test_t5_is_heard_and_can_be_left_out(tiny_sd35_path: Path, tmp_path: Path) -> None:
    model, edge = exported(tiny_sd35_path, tmp_path / "with")
    assert sorted(edge.bundle.manifest.tokenizers) == ["tokenizer", "tokenizer_2", "tokenizer_3"]
    texts = model.mmdit.encode_prompts(model.pipeline, PROMPTS, model.defaults.max_sequence_length)
    hidden, pooled = edge._encode(PROMPTS)
    np.testing.assert_allclose(hidden, texts.tokens_BTJ.numpy(), atol=1e-4)
    np.testing.assert_allclose(pooled, texts.pooled_BP.numpy(), atol=1e-4)
    _, silent = exported(tiny_sd35_path, tmp_path / "without", without_t5=True)
    clip = edge.bundle.manifest.tokenizers["tokenizer"].max_length
    zeros, _ = silent._encode(PROMPTS)
    assert hidden[:, clip:].any()
    assert not zeros[:, clip:].any()
    np.testing.assert_array_equal(zeros[:, :clip], hidden[:, :clip])
