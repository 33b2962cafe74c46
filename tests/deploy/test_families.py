"""What differs between the families: text encoders, guidance and how the steps are laid out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusion3Pipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from deploy.bundle import BundleError, manifest_from_json, manifest_to_json, open_bundle
from deploy.errors import DeployError
from deploy.pipeline import EdgePipeline
from deploy.session import Session

MakeBundle = Callable[..., Path]

PROMPTS = ["a red circle", "a star"]
NEGATIVES = ["green stars", ""]
LONG = "a red star a red circle a star a red star"


class Encoder(torch.nn.Module):
    """A text encoder as diffusers calls it, run by the bundle's graph."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, pipe: EdgePipeline, name: str, *, is_t5: bool) -> None:
        super().__init__()
        self.graph = Session(pipe.bundle.file(pipe.bundle.manifest.graphs[name][0].path))
        self.is_t5 = is_t5

    def forward(self, ids: torch.Tensor, output_hidden_states: bool = False) -> Any:
        outputs = {
            name: torch.from_numpy(array)
            for name, array in self.graph.run({"input_ids": ids.numpy()}).items()
        }
        hidden, pooled = outputs["hidden_states"], outputs["pooled"]
        if self.is_t5:
            return (hidden,)

        class Outputs(tuple):
            hidden_states = (None, hidden, None)
            pooler_output = pooled

        return Outputs([pooled])


def stand_in(kind: type, pipe: EdgePipeline, **parts: Any) -> Any:
    """Something with the parts that the text encoding of a diffusers pipeline looks at."""

    class StandIn(SimpleNamespace):
        _execution_device = torch.device("cpu")
        tokenizer_max_length = 16

    names = ("_get_t5_prompt_embeds", "_get_clip_prompt_embeds", "encode_prompt")
    for name in names:
        setattr(StandIn, name, getattr(kind, name))
    config = SimpleNamespace(joint_attention_dim=pipe.bundle.manifest.architecture.joint_attention_dim)
    return StandIn(transformer=SimpleNamespace(config=config), **parts)


def padded_as_clip(path: Path, tokenizer: CLIPTokenizer) -> EdgePipeline:
    """Open a bundle, its CLIP tokens padded as the tokenizer of diffusers does."""
    pipe = EdgePipeline.open(path, target="cpu-x86", threads=1)
    entries = {
        name: dataclasses.replace(entry, pad_id=tokenizer.pad_token_id if entry.max_length == 16 else 0)
        for name, entry in pipe.bundle.manifest.tokenizers.items()
    }
    manifest = dataclasses.replace(pipe.bundle.manifest, tokenizers=entries)
    return EdgePipeline(dataclasses.replace(pipe.bundle, manifest=manifest), pipe.variant, threads=1)


@pytest.mark.parametrize("with_t5", [True, False])
def test_text_of_sd3_is_that_of_diffusers(
    make_bundle: MakeBundle,
    make_sd3_with_t5: MakeBundle,
    tokenizer: CLIPTokenizer,
    t5_tokenizer: PreTrainedTokenizerFast,
    with_t5: bool,
) -> None:
    pipe = padded_as_clip(make_sd3_with_t5() if with_t5 else make_bundle(), tokenizer)
    theirs = stand_in(
        StableDiffusion3Pipeline,
        pipe,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=t5_tokenizer if with_t5 else None,
        text_encoder=Encoder(pipe, "text_encoder", is_t5=False),
        text_encoder_2=Encoder(pipe, "text_encoder_2", is_t5=False),
        text_encoder_3=Encoder(pipe, "text_encoder_3", is_t5=True) if with_t5 else None,
    )
    prompts = [*PROMPTS, LONG]
    expected, _, expected_pooled, _ = theirs.encode_prompt(
        prompt=prompts, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False, max_sequence_length=7
    )
    hidden, pooled = pipe._encode(prompts)
    assert hidden.shape == (3, 16 + 7, 10)
    assert bool(hidden[:, 16:].any()) is with_t5
    np.testing.assert_allclose(hidden, expected.numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(pooled, expected_pooled.numpy(), rtol=0, atol=1e-6)


def test_text_of_flux_is_that_of_diffusers(
    make_flux: MakeBundle, tokenizer: CLIPTokenizer, t5_tokenizer: PreTrainedTokenizerFast
) -> None:
    pipe = padded_as_clip(make_flux(), tokenizer)
    expected, expected_pooled = flux_text(pipe, tokenizer, t5_tokenizer, [*PROMPTS, LONG])
    hidden, pooled = pipe._encode([*PROMPTS, LONG])
    assert hidden.shape == (3, 7, 10)
    np.testing.assert_allclose(hidden, expected.numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(pooled, expected_pooled.numpy(), rtol=0, atol=1e-6)


def flux_text(
    pipe: EdgePipeline, tokenizer: CLIPTokenizer, t5_tokenizer: PreTrainedTokenizerFast, prompts: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    theirs = stand_in(
        FluxPipeline,
        pipe,
        tokenizer=tokenizer,
        tokenizer_2=t5_tokenizer,
        text_encoder=Encoder(pipe, "text_encoder", is_t5=False),
        text_encoder_2=Encoder(pipe, "text_encoder_2", is_t5=True),
    )
    hidden, pooled, _ = theirs.encode_prompt(prompt=prompts, prompt_2=None, max_sequence_length=7)
    return hidden, pooled


@pytest.mark.parametrize("guidance_embeds", [True, False], ids=["dev", "schnell"])
def test_pictures_of_flux_are_those_of_the_diffusers_loop(
    make_flux: MakeBundle,
    tokenizer: CLIPTokenizer,
    t5_tokenizer: PreTrainedTokenizerFast,
    guidance_embeds: bool,
) -> None:
    pipe = padded_as_clip(make_flux(guidance_embeds=guidance_embeds), tokenizer)
    manifest, steps = pipe.bundle.manifest, 3
    noise = np.random.default_rng(7).standard_normal((2, 4, 8, 12), np.float32)
    hidden, pooled = flux_text(pipe, tokenizer, t5_tokenizer, PROMPTS)
    options = dataclasses.asdict(manifest.scheduler)
    del options["spacing"]
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    mu = calculate_shift((8 // 2) * (12 // 2), 256, 4096, 0.5, 1.15)
    sigmas = np.linspace(1.0, 1 / steps, steps)
    timesteps, _ = retrieve_timesteps(scheduler, steps, "cpu", sigmas=sigmas, mu=mu)
    latents = torch.from_numpy(noise)
    transformer = Session(pipe.bundle.file("transformer/model.onnx"))
    for t in timesteps:
        inputs = {
            "hidden_states": latents.numpy(),
            "timestep": t.expand(2).numpy(),
            "encoder_hidden_states": hidden.numpy(),
            "pooled_projections": pooled.numpy(),
        }
        if guidance_embeds:
            inputs["guidance"] = np.full(2, 3.5, np.float32)
        velocity = torch.from_numpy(transformer.run(inputs)["velocity"])
        latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
    scaled = latents / manifest.architecture.scaling_factor + manifest.architecture.shift_factor
    image = Session(pipe.bundle.file("vae_decoder/model.onnx")).run({"latents": scaled.numpy()})["image"]
    expected = np.stack([np.asarray(one) for one in VaeImageProcessor().postprocess(torch.from_numpy(image))])

    scale = {"guidance_scale": 3.5} if guidance_embeds else {}
    made = pipe(PROMPTS, steps=steps, height=64, width=96, latents=noise, **scale)
    difference = np.abs(np.stack([np.asarray(one) for one in made.images]).astype(int) - expected)
    assert difference.max() <= 1  # a last place of float32 may fall on the other side of a half
    assert (difference > 0).mean() < 1e-3


def test_flux_makes_one_pass_whatever_the_scale(
    make_flux: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = EdgePipeline.open(make_flux(), target="cpu-x86", threads=1)
    batches: list[int] = []
    run = pipe._run

    def spy(component: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        if component == "transformer":
            batches.append(len(inputs["hidden_states"]))
        return run(component, **inputs)

    monkeypatch.setattr(pipe, "_run", spy)
    pictures = [np.asarray(pipe("a star", steps=2, guidance_scale=scale).images[0]) for scale in (1.0, 3.5)]
    assert batches == [1, 1, 1, 1]
    assert (pictures[0] != pictures[1]).any()


def test_what_the_model_cannot_heed_is_refused(make_flux: MakeBundle) -> None:
    pipe = EdgePipeline.open(make_flux(guidance_embeds=False), target="cpu-x86", threads=1)
    with pytest.raises(DeployError, match="makes no second pass, so a negative prompt changes nothing"):
        pipe("a star", "a circle")
    with pytest.raises(
        DeployError, match=r"was distilled to a fixed guidance, so guidance_scale 3\.5 changes nothing"
    ):
        pipe("a star", guidance_scale=3.5)
    pipe("a star", ["", ""][:1], steps=1, guidance_scale=0.0)


def _fault_of(path: Path, **changes: Any) -> str:
    manifest = dataclasses.replace(open_bundle(path).manifest, **changes)
    with pytest.raises(BundleError) as caught:
        manifest_from_json(manifest_to_json(manifest))
    return str(caught.value)


def test_families_have_their_own_text_encoders(make_flux: MakeBundle) -> None:
    manifest = open_bundle(path := make_flux()).manifest
    without = {name: graphs for name, graphs in manifest.graphs.items() if name != "text_encoder_2"}
    assert "graphs must be those of" in _fault_of(path, graphs=without)
    third = {**manifest.graphs, "text_encoder_3": manifest.graphs["text_encoder_2"]}
    assert "graphs must be those of" in _fault_of(path, graphs=third)


def test_every_text_encoder_has_a_tokenizer(make_sd3_with_t5: MakeBundle) -> None:
    manifest = open_bundle(path := make_sd3_with_t5()).manifest
    assert "text_encoder_3" in manifest.graphs
    without = {name: entry for name, entry in manifest.tokenizers.items() if name != "tokenizer_3"}
    assert "tokenizers must be those of tokenizer, tokenizer_2, tokenizer_3" in _fault_of(
        path, tokenizers=without
    )


@pytest.mark.parametrize("length", [1, 6])
def test_length_of_t5_is_that_of_the_defaults(make_sd3_with_t5: MakeBundle, length: int) -> None:
    manifest = open_bundle(path := make_sd3_with_t5()).manifest
    t5 = dataclasses.replace(manifest.tokenizers["tokenizer_3"], max_length=length)
    entries = {**manifest.tokenizers, "tokenizer_3": t5}
    assert "the max_length of tokenizer_3, which is T5's" in _fault_of(path, tokenizers=entries)
    defaults = dataclasses.replace(manifest.defaults, max_sequence_length=length)
    variants = manifest.variants[1:]  # the engine is for another length of text
    shorter = dataclasses.replace(manifest, tokenizers=entries, defaults=defaults, variants=variants)
    manifest_from_json(manifest_to_json(shorter))


def test_guidance_is_that_of_the_family(make_flux: MakeBundle, make_bundle: MakeBundle) -> None:
    path = make_flux()
    architecture = open_bundle(path).manifest.architecture
    second = dataclasses.replace(architecture, classifier_free=True)
    assert "flux makes no second pass" in _fault_of(path, architecture=second)
