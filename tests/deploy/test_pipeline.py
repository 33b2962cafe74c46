from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from onnx import numpy_helper
from PIL import Image
from transformers import CLIPTokenizer

from deploy import choice, pipeline, session
from deploy.bundle import MANIFEST, Bundle, manifest_to_json, open_bundle
from deploy.errors import Cancelled, DeployError
from deploy.memory import Placement
from deploy.pipeline import EdgePipeline, Result, save_png
from deploy.session import Session

MakeBundle = Callable[..., Path]


@pytest.fixture
def pipe(make_bundle: MakeBundle) -> EdgePipeline:
    return EdgePipeline.open(make_bundle(), target="cpu-x86", threads=1)


def change_manifest(path: Path, **changes: object) -> None:
    manifest = dataclasses.replace(open_bundle(path).manifest, **changes)  # type: ignore[arg-type]
    (path / MANIFEST).write_text(json.dumps(manifest_to_json(manifest)))


def pictures(result: Result) -> np.ndarray:
    return np.stack([np.asarray(image) for image in result.images])


def diffusers_pictures(
    pipe: EdgePipeline,
    tokenizer: CLIPTokenizer,
    prompts: list[str],
    negatives: list[str],
    guidance: float,
    steps: int,
    noise: np.ndarray,
) -> np.ndarray:
    """StableDiffusion3Pipeline's own loop in torch, with the bundle's graphs for its parts."""
    manifest = pipe.bundle.manifest
    graphs = {name: Session(pipe.bundle.file(graphs[0].path)) for name, graphs in manifest.graphs.items()}

    def call(name: str, output: str, **inputs: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(
            graphs[name].run({key: value.numpy() for key, value in inputs.items()})[output]
        )

    def encode(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = tokenizer(texts, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
        ids = torch.where(ids.attention_mask.bool(), ids.input_ids, 3)  # the bundle pads with another token
        encoders = ("text_encoder", "text_encoder_2")
        clip = torch.cat([call(name, "hidden_states", input_ids=ids) for name in encoders], dim=-1)
        t5 = torch.zeros(len(texts), 7, 10)
        clip = torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        pooled = torch.cat([call(name, "pooled", input_ids=ids) for name in encoders], dim=-1)
        return torch.cat([clip, t5], dim=-2), pooled

    hidden, pooled = encode(prompts)
    if guidance > 1:
        negative_hidden, negative_pooled = encode(negatives)
        hidden, pooled = torch.cat([negative_hidden, hidden]), torch.cat([negative_pooled, pooled])
    options = dataclasses.asdict(manifest.scheduler)
    del options["spacing"]  # it is the pipeline's choice, not the scheduler's
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    scheduler.set_timesteps(steps)
    latents = torch.from_numpy(noise)
    for t in scheduler.timesteps:
        batch = torch.cat([latents] * 2) if guidance > 1 else latents
        velocity = call(
            "transformer",
            "velocity",
            hidden_states=batch,
            timestep=t.expand(batch.shape[0]),
            encoder_hidden_states=hidden,
            pooled_projections=pooled,
        )
        if guidance > 1:
            uncond, text = velocity.chunk(2)
            velocity = uncond + guidance * (text - uncond)
        latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
    latents = latents / manifest.architecture.scaling_factor + manifest.architecture.shift_factor
    image = call("vae_decoder", "image", latents=latents)
    return np.stack([np.asarray(picture) for picture in VaeImageProcessor().postprocess(image)])


@pytest.mark.parametrize("guidance", [3.0, 1.0, 0.0])
def test_pictures_are_those_of_the_diffusers_loop(
    pipe: EdgePipeline, tokenizer: CLIPTokenizer, guidance: float
) -> None:
    prompts, negatives = ["a red circle", "two blue squares above a green star"], ["green", ""]
    noise = np.random.default_rng(7).standard_normal((2, 4, 8, 8), np.float32)
    made = pipe(prompts, negatives, steps=3, guidance_scale=guidance, latents=noise)
    expected = diffusers_pictures(pipe, tokenizer, prompts, negatives, guidance, 3, noise)
    assert pictures(made).shape == (2, 64, 64, 3)
    difference = np.abs(pictures(made).astype(int) - expected)
    assert difference.max() <= 1  # a last place of float32 may fall on the other side of a half
    assert (difference > 0).mean() < 1e-3


def test_negative_prompt_matters_with_guidance_only(pipe: EdgePipeline) -> None:
    def make(negative: str, guidance: float) -> np.ndarray:
        return pictures(pipe("a red circle", negative, steps=2, guidance_scale=guidance))

    assert (make("", 1.0) == make("a green star", 1.0)).all()
    assert (make("", 1.1) != make("a green star", 1.1)).any()


def test_same_seed_makes_the_same_picture(pipe: EdgePipeline) -> None:
    first, again, other = (pictures(pipe("a star", steps=2, seed=seed)) for seed in (5, 5, 6))
    assert (first == again).all()
    assert (first != other).any()


def test_picture_of_a_batch_is_the_one_made_alone_with_its_seed(pipe: EdgePipeline) -> None:
    batch = pipe(["a star", "a red circle"], steps=2, num_images=2, seed=10)
    assert batch.seeds == [10, 11, 12, 13]
    alone = pipe("a red circle", steps=2, seed=12)
    assert (pictures(batch)[2] == pictures(alone)[0]).all()


def test_defaults_are_those_of_the_bundle(pipe: EdgePipeline) -> None:
    steps: list[tuple[int, int]] = []
    made = pipe("a star", on_step=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    explicit = pipe("a star", "", steps=4, guidance_scale=3.0, height=64, width=64, num_images=1, seed=0)
    assert (pictures(made) == pictures(explicit)).all()
    assert made.variant.target == "cpu-x86"


@pytest.mark.parametrize("steps", range(5))
def test_cancelled_picture_takes_no_further_step(pipe: EdgePipeline, steps: int) -> None:
    """After as many steps as this; the last of them is the decoder's turn."""
    done: list[int] = []
    with pytest.raises(Cancelled):
        pipe("a star", on_step=lambda step, _: done.append(step), cancel=lambda: len(done) == steps)
    assert len(done) == steps
    assert "vae_decoder" not in pipe._sessions


def test_pipeline_that_was_cancelled_paints_the_next_picture(pipe: EdgePipeline) -> None:
    with pytest.raises(Cancelled):
        pipe("a star", cancel=lambda: True)
    made = pipe("a star", cancel=lambda: False)
    assert (pictures(made) == pictures(pipe("a star"))).all()


def test_request_is_checked_before_it_is_made(pipe: EdgePipeline) -> None:
    pipe.check("a star", guidance_scale=2.0, height=32, width=128)
    with pytest.raises(DeployError, match="width 144"):
        pipe.check(width=144)
    with pytest.raises(DeployError, match="guidance_scale must be a number"):
        pipe.check(guidance_scale=float("inf"))
    assert (pipe.size_unit, pipe.largest_size) == (16, 128)


def test_parts_are_loaded_when_asked_for(make_bundle: MakeBundle, opened: list[str]) -> None:
    pipe = EdgePipeline.open(make_bundle(), target="cpu-x86", threads=1)
    assert opened == []
    pipe.load()
    assert sorted(opened) == ["text_encoder", "text_encoder_2", "transformer", "vae_decoder"]
    assert pipe("a star").timings_ms["load"] == 0
    assert len(opened) == 4


def test_timings_add_up(pipe: EdgePipeline) -> None:
    first, second = (pipe("a star", steps=3).timings_ms for _ in range(2))
    assert len(first["steps"]) == 3
    assert first["transformer"] == sum(first["steps"])
    assert first["load"] > 0
    assert second["load"] == 0  # parts stay loaded
    for timings in (first, second):
        parts = sum(timings[part] for part in ("load", "text_encoders", "transformer", "vae_decoder"))
        assert 0 < parts <= timings["total"]
    assert json.loads(json.dumps(first)) == first


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Components in the order they are loaded and dropped, those dropped with a minus."""
    events: list[str] = []

    class Spy(Session):
        def __init__(self, path: Path, **options: Any) -> None:
            super().__init__(path, **options)
            events.append(self.path.parent.name)

        def close(self) -> None:
            super().close()
            events.append(f"-{self.path.parent.name}")

    monkeypatch.setattr(session, "Session", Spy)
    return events


def test_parts_are_dropped_before_the_next_is_loaded_to_save_memory(
    make_bundle: MakeBundle, opened: list[str]
) -> None:
    path = make_bundle()
    sparing = EdgePipeline.open(path, target="cpu-x86", threads=1, keep="one")
    first = sparing("a star", steps=2)
    order = ["text_encoder", "text_encoder_2", "transformer", "vae_decoder"]
    expected = [order[0]]
    for before, name in pairwise(order):
        expected += [f"-{before}", name]
    assert opened == expected
    assert first.timings_ms["load"] > 0
    opened.clear()
    again = sparing("a star", steps=2)
    assert opened == ["-vae_decoder", "transformer", "-transformer", "vae_decoder"]  # the text is known
    opened.clear()
    keeping = EdgePipeline.open(path, target="cpu-x86", threads=1, keep="all")
    assert (pictures(keeping("a star", steps=2)) == pictures(first)).all()
    assert (pictures(keeping("a star", steps=2)) == pictures(again)).all()
    assert opened == order


@pytest.mark.parametrize(("available", "keep"), [(1, "one"), (10**9, "all"), (None, "all")])
def test_parts_stay_where_memory_allows_it(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch, available: int | None, keep: str
) -> None:
    monkeypatch.setattr(pipeline, "available_bytes", lambda: available)
    path = make_bundle()
    chosen = EdgePipeline.open(path, target="cpu-x86")
    assert chosen.keep == keep
    assert "loaded" in chosen.reasons[-1]
    assert EdgePipeline.open(path, target="cpu-x86", keep="all").keep == "all"


GB = 10**9


@pytest.mark.parametrize(
    ("providers", "free", "on_gpu", "keep", "tile"),
    [
        (["CUDAExecutionProvider"], 80 * GB, True, "all", 128),
        (["CUDAExecutionProvider"], 8 * GB, True, "all", 64),
        (["CUDAExecutionProvider"], 4 * GB, True, "one", 64),
        (["CUDAExecutionProvider"], 2 * GB, False, "one", 128),
        ([], 80 * GB, False, "one", 128),
    ],
)
def test_where_the_transformer_runs_on_a_gpu_the_other_parts_do_too_if_they_can(
    make_bundle: MakeBundle,
    monkeypatch: pytest.MonkeyPatch,
    providers: list[str],
    free: int,
    on_gpu: bool,
    keep: str,
    tile: int,
) -> None:
    monkeypatch.setattr(choice, "obstacle_of", lambda variant: None)
    monkeypatch.setattr(choice, "available_providers", lambda: [*providers, "CPUExecutionProvider"])
    monkeypatch.setattr(choice, "free_gpu_bytes", lambda: free)
    monkeypatch.setattr(pipeline, "available_bytes", lambda: 1)  # of the computer's own memory
    opened = EdgePipeline.open(path := make_bundle(), target="rtx4090")
    assert (opened.keep, opened._placement.tile) == (keep, tile)
    asked = []

    def told(bundle: Bundle, path: str, **options: Any) -> None:
        asked.append((path, options["on_gpu"]))

    monkeypatch.setattr(pipeline, "open_graph", told)
    opened._session("vae_decoder")
    assert asked == [("vae_decoder/model.onnx", on_gpu)]
    # What runs on a processor leaves the GPU alone.
    assert EdgePipeline.open(path, target="cpu-x86")._placement == Placement()


def test_known_prompts_are_not_encoded_again(pipe: EdgePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[list[str]] = []
    encode = pipe._encode_together

    def spy(prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded.append(prompts)
        return encode(prompts)

    monkeypatch.setattr(pipe, "_encode_together", spy)
    pipe(["a star", "a star"], steps=1)
    assert encoded == [["", "a star"]]
    pipe("a red circle", steps=1)
    assert encoded[1:] == [["a red circle"]]
    hidden, pooled = pipe._encode(["a star", "", "a red circle"])
    assert len(encoded) == 2
    for index, prompt in enumerate(["a star", "", "a red circle"]):
        alone_hidden, alone_pooled = encode([prompt])
        assert (hidden[index] == alone_hidden[0]).all()
        assert (pooled[index] == alone_pooled[0]).all()


def test_text_of_the_last_prompts_is_kept_and_no_more(pipe: EdgePipeline) -> None:
    prompts = [f"a star {number}" for number in range(10)]
    hidden, _ = pipe._encode(prompts)
    assert len(hidden) == 10
    assert list(pipe._texts) == prompts[2:]
    pipe._encode([prompts[2]])
    pipe._encode(["a circle"])
    assert list(pipe._texts) == [*prompts[4:], prompts[2], "a circle"]


def test_picture_need_not_be_square(pipe: EdgePipeline) -> None:
    assert pipe("a star", steps=1, height=32, width=128).images[0].size == (128, 32)


def test_large_pictures_are_decoded_in_tiles(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = open_bundle(path := make_bundle()).manifest
    large = dataclasses.replace(manifest.architecture, max_latent_size=160)
    change_manifest(path, architecture=large)
    pipe = EdgePipeline.open(path, target="cpu-x86", threads=1)
    decoded: list[tuple[int, ...]] = []
    run = pipe._run

    def spy(component: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        if component == "vae_decoder":
            decoded.append(inputs["latents"].shape)
        return run(component, **inputs)

    monkeypatch.setattr(pipe, "_run", spy)
    pipe("a star", steps=1, height=1024, width=1024)
    assert decoded == [(1, 4, 128, 128)]
    decoded.clear()
    tiled = pictures(pipe("a star", steps=1, height=64, width=1280))
    assert decoded == [(1, 4, 8, 128)] * 2
    pipe._placement = Placement(tile=160)  # the decoder sees one latent for a pixel, so tiles change nothing
    whole = pictures(pipe("a star", steps=1, height=64, width=1280))
    assert np.abs(tiled.astype(int) - whole).max() <= 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"height": 70}, r"height 70: it takes multiples of 16 from 16 to 128. The nearest is 64"),
        ({"width": 75}, "width 75: .* The nearest is 80"),
        ({"width": 144}, "width 144: .* The nearest is 128"),
        ({"height": 0}, "height 0: .* The nearest is 16"),
    ],
)
def test_size_the_model_cannot_make_names_the_nearest(
    pipe: EdgePipeline, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(DeployError, match=message):
        pipe("a star", **sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "one step at least, not 0"),
        ({"num_images": 0}, "num_images must be one at least"),
        ({"seed": -1}, "seed must not be negative"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number"),
        ({"prompt": []}, "prompt has 0 entries; give one at least"),
        (
            {"negative_prompt": ["a", "b"]},
            "negative_prompt has 2 entries; give one for each of the 1 prompts",
        ),
        ({"latents": np.zeros((1, 4, 8, 4))}, r"shape \[1, 4, 8, 4\]; this call needs \[1, 4, 8, 8\]"),
    ],
)
def test_request_that_makes_no_sense_is_refused(
    pipe: EdgePipeline, options: dict[str, object], message: str
) -> None:
    with pytest.raises(DeployError, match=message):
        pipe(**{"prompt": "a star", **options})  # type: ignore[arg-type]


LONG = "a red circle above a blue square and a green star below a red square above a Blue star"


@pytest.mark.parametrize("prompt", ["", "a red circle", "A  RED\tcircle!?", "été ☃", "</w>", LONG])
def test_tokens_are_those_of_clip(pipe: EdgePipeline, tokenizer: CLIPTokenizer, prompt: str) -> None:
    expected = tokenizer(prompt, padding="max_length", max_length=16, truncation=True)
    ids = [
        token if kept else 3
        for token, kept in zip(expected["input_ids"], expected["attention_mask"], strict=True)
    ]
    assert pipe._tokens("tokenizer", [prompt]).tolist() == [ids]


def test_cut_prompt_is_warned_of(pipe: EdgePipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="deploy.pipeline"):
        pipe._tokens("tokenizer", ["a red circle"])
        assert not caplog.records
        pipe._tokens("tokenizer", [LONG])
    (record,) = caplog.records
    assert record.getMessage() == (
        "The prompt is longer than the 16 tokens the model reads, so this was left out: "
        "'below a red square above a Blue star'"
    )


def constants_set(graph: str, **values: float) -> Callable[[Path], None]:
    """Fill constants of a graph of the bundle with one value."""

    def edit(path: Path) -> None:
        model = onnx.load(str(path / graph / "model.onnx"))
        for tensor in model.graph.initializer:
            if tensor.name in values:
                array = np.full_like(numpy_helper.to_array(tensor), values[tensor.name])
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        onnx.save(model, str(path / graph / "model.onnx"))

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (constants_set("transformer", ten=np.nan), "not finite in step 1 of 2: there is no picture"),
        (constants_set("vae_decoder", kernel=np.inf), "not finite for picture 1"),
        (constants_set("vae_decoder", kernel=0), r"Picture 1 is one flat colour, \[128, 128, 128\]"),
    ],
)
def test_what_is_no_picture_is_no_success(
    make_bundle: MakeBundle, edit: Callable[[Path], None], message: str
) -> None:
    pipe = EdgePipeline.open(make_bundle(edit), target="cpu-x86", threads=1)
    with pytest.raises(DeployError, match=message):
        pipe("a star", steps=2)


def test_broken_tokenizer_is_refused(make_bundle: MakeBundle) -> None:
    path = make_bundle(lambda path: (path / "tokenizer" / "tokenizer.json").write_text("{}"))
    with pytest.raises(DeployError, match=r"tokenizer\.json is not a tokenizer"):
        EdgePipeline.open(path, target="cpu-x86")("a star")


def test_damaged_bundle_does_not_open(make_bundle: MakeBundle) -> None:
    path = make_bundle()
    (path / "vae_decoder" / "model.onnx").write_bytes(b"")
    with pytest.raises(DeployError, match="has 0 bytes where its manifest says"):
        EdgePipeline.open(path)


def test_reasons_for_the_variant_are_kept(make_bundle: MakeBundle) -> None:
    pipe = EdgePipeline.open(make_bundle(), threads=1)
    assert pipe.reasons[-2].startswith("cpu-x86 (onnxruntime-cpu): runs here")


def test_what_the_engine_was_not_built_for_is_refused_before_any_work(make_bundle: MakeBundle) -> None:
    bundle = open_bundle(make_bundle())
    pipe = EdgePipeline(bundle, bundle.manifest.variants[0])
    with pytest.raises(
        DeployError,
        match=r"engine for rtx4090 makes pictures of \(height x width\) 64x64, 64x32, not 32x64\. "
        r".*has \[32, 64\] among its buckets",
    ):
        pipe("a star", height=32)
    with pytest.raises(DeployError, match=r"makes 2 pictures at a time at most, not 3\. .*larger max_batch"):
        pipe(["a star", "a circle", "a square"])
    assert not pipe._sessions


def test_no_threads_are_refused_at_once(make_bundle: MakeBundle) -> None:
    with pytest.raises(DeployError, match="one thread at least, not 0"):
        EdgePipeline.open(make_bundle(), threads=0)


def test_pictures_are_saved_side_by_side(tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (2, 1), "red"), Image.new("RGB", (2, 1), "blue")
    save_png([red, blue], tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as image:
        assert np.asarray(image).tolist() == [[[255, 0, 0]] * 2 + [[0, 0, 255]] * 2]
    with pytest.raises(DeployError, match=r"Cannot write the picture .*: No such file"):
        save_png([red], tmp_path / "gone" / "out.png")
