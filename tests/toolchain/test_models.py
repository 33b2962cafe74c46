"""Opening, saving and sampling from models, on tiny pipelines with random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from toolchain.errors import ToolchainError
from toolchain.families import GenerationDefaults, Model, open_model
from toolchain.families.names import stored_names
from toolchain.families.stored import StoredTensors
from toolchain.families.view import save_model
from toolchain.trajectories import States, sample_states, state_bytes


def test_a_name_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="there is no model 'nosuch'"):
        open_model("nosuch")
    with pytest.raises(ToolchainError, match=r"without model_index\.json"):
        open_model(str(tmp_path))


def test_an_unsupported_class_is_named_with_what_is_supported(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(
        ToolchainError,
        match="is a StableDiffusionPipeline; supported: StableDiffusion3Pipeline, FluxPipeline",
    ):
        open_model(str(tmp_path))


def test_a_transformer_of_another_family_is_refused(tiny_path: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_path, tmp_path / "model")
    change(tmp_path / "model/model_index.json", transformer=["diffusers", "FluxTransformer2DModel"])
    with pytest.raises(ToolchainError, match="that of a StableDiffusion3Pipeline is a SD3Transformer2DModel"):
        open_model(str(tmp_path / "model"))


def test_unknown_generation_defaults_are_refused(tiny_path: Path, tmp_path: Path) -> None:
    for part in tiny_path.iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "generation_defaults.json").unlink()
    (tmp_path / "generation_defaults.json").write_text(json.dumps({"schema_version": 1, "steps": 4}))
    with pytest.raises(ToolchainError, match=r"has the keys \['steps'\]"):
        open_model(str(tmp_path))


def test_a_student_keeps_the_precision_its_teacher_is_stored_in(tiny: Model, tmp_path: Path) -> None:
    save_model(tiny, tmp_path)
    assert open_model(str(tmp_path)).stored_dtype == torch.float16
    size = (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size == pytest.approx(2 * open_model(str(tmp_path)).num_parameters, rel=0.05)


def test_states_hold_what_the_teacher_says_there(tiny: Model, states: States) -> None:
    latents, timesteps, text, said = states.batch(slice(None))
    with torch.no_grad():
        again = tiny.mmdit.velocity(latents, timesteps, text)
    assert len(states) == 2 * 2 * 2  # prompts, steps, with and without the prompt
    torch.testing.assert_close(again, said, rtol=1e-4, atol=1e-5)


def test_sampling_passes_through_the_states_of_the_pipeline(tiny: Model) -> None:
    states = sample_states(tiny, ["a red circle"], seed=3)
    noise = np.random.default_rng(3).standard_normal((1, *tiny.latent_shape), dtype=np.float32)
    seen: list[torch.Tensor] = []
    tiny.pipeline.transformer.register_forward_pre_hook(
        lambda _module, _args, inputs: seen.append(inputs["hidden_states"].clone()), with_kwargs=True
    )
    tiny.paint(["a red circle"], noise)
    expected = torch.cat(seen).flatten(1)
    for state in states.latents.flatten(1):
        assert (expected - state).abs().amax(dim=1).min() < 1e-4


def change(path: Path, **values: object) -> None:
    """Change keys of a JSON file; None takes one out."""
    data = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def rewrite(path: Path, alter: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    alter(tensors)
    save_file(tensors, path, {"format": "pt"})


TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: (path / "model_index.json").write_text("{"), id="index is no JSON"),
        pytest.param(lambda path: (path / "model_index.json").write_text("[]"), id="index is a list"),
        pytest.param(lambda path: (path / "transformer/config.json").unlink(), id="no config"),
        pytest.param(lambda path: (path / TRANSFORMER).unlink(), id="no weights"),
        pytest.param(lambda path: shutil.rmtree(path / "vae"), id="no part"),
        pytest.param(lambda path: (path / TRANSFORMER).write_bytes(b"cut"), id="cut weights"),
        pytest.param(
            lambda path: (path / "text_encoder/model.safetensors").write_bytes(b"cut"),
            id="cut weights of a text encoder",
        ),
        pytest.param(
            lambda path: rewrite(path / TRANSFORMER, lambda tensors: tensors.pop("proj_out.weight")),
            id="a tensor is missing",
        ),
        pytest.param(
            lambda path: rewrite(
                path / TRANSFORMER, lambda tensors: tensors.update(extra=tensors["proj_out.weight"].clone())
            ),
            id="a tensor too many",
        ),
        pytest.param(
            lambda path: rewrite(path / VAE, lambda tensors: tensors.pop("decoder.conv_in.weight")),
            id="a tensor of the vae is missing",
        ),
        pytest.param(
            lambda path: rewrite(
                path / TEXT_ENCODER, lambda tensors: tensors.pop("text_model.final_layer_norm.weight")
            ),
            id="a tensor of a text encoder is missing",
        ),
        pytest.param(
            lambda path: change(path / "transformer/config.json", num_layers=5), id="fewer blocks than stored"
        ),
        pytest.param(
            lambda path: change(path / "model_index.json", vae=["os", "system"]), id="a part of no library"
        ),
        pytest.param(
            lambda path: change(path / "generation_defaults.json", num_inference_steps="two"),
            id="steps that are no number",
        ),
        pytest.param(
            lambda path: change(path / "generation_defaults.json", num_inference_steps=0),
            id="no steps",
        ),
        pytest.param(
            lambda path: change(path / "generation_defaults.json", height=60),
            id="a height no latent has",
        ),
        pytest.param(lambda path: change(path / "generation_defaults.json", world="moon"), id="world"),
        pytest.param(lambda path: change(path / "generation_defaults.json", height=None), id="no height"),
        pytest.param(
            lambda path: change(path / "generation_defaults.json", schema_version=2), id="newer defaults"
        ),
    ],
)
def test_a_damaged_model_is_refused_when_it_is_opened(
    damage: Callable[[Path], object], tiny_path: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    shutil.copytree(tiny_path, path)
    damage(path)
    with pytest.raises(ToolchainError):
        open_model(str(path))


def test_a_model_that_says_nothing_of_itself_runs_as_diffusers_would(tiny_path: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_path, tmp_path / "model")
    (tmp_path / "model" / "generation_defaults.json").unlink()
    model = open_model(str(tmp_path / "model"))
    assert (model.defaults, model.world) == (GenerationDefaults(), None)


def test_a_model_opens_in_float32_and_ready_for_inference(tiny: Model) -> None:
    parts = [part for part in tiny.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert len(parts) == 4
    for part in parts:
        assert not part.training
        assert {item.dtype for item in part.parameters()} == {torch.float32}
        assert not any(item.requires_grad for item in part.parameters())


def test_of_a_hub_model_no_pickle_is_fetched(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def snapshot_download(source: str, *, allow_patterns: list[str], ignore_patterns: str) -> str:
        asked.update(source=source, allow=allow_patterns, ignore=ignore_patterns)
        return str(tiny_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert open_model("owner/name").source == "owner/name"
    assert asked["source"] == "owner/name"

    def fetched(name: str) -> bool:
        allowed = any(fnmatch(name, pattern) for pattern in asked["allow"])  # type: ignore[attr-defined]
        return allowed and not fnmatch(name, str(asked["ignore"]))

    assert fetched("model_index.json")
    assert fetched(TRANSFORMER)
    assert not any(
        map(fetched, ("vae/diffusion_pytorch_model.bin", "unet.ckpt", "a/b.pt", "a/b.pkl", "a.py"))
    )
    assert not fetched("sd3_medium.safetensors")
    assert not fetched("transformer/diffusion_pytorch_model.fp16.safetensors")


def test_what_the_hub_does_not_give_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def snapshot_download(source: str, **_: object) -> str:
        raise LocalEntryNotFoundError("no connection\n\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ToolchainError, match=r"no directory 'owner/name'.*no connection$"):
        open_model("owner/name")


@pytest.mark.parametrize("source", ["a/b/c", "./model", "/model", "~/model", "owner/"])
def test_what_is_no_hub_id_is_not_asked_for(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise AssertionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ToolchainError, match="there is no model"):
        open_model(source)


def test_a_saved_model_is_readable_by_all_and_free_of_pickles_and_paths(tiny: Model, tmp_path: Path) -> None:
    save_model(tiny, tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)
    assert not [path for path in files if path.suffix == ".json" and str(tiny.path) in path.read_text()]


def test_a_seed_decides_all_states(tiny: Model) -> None:
    first, again, other = (sample_states(tiny, ["a red circle"], seed=seed) for seed in (1, 1, 2))
    for name in ("latents", "timesteps", "velocities", "prompt_index"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.latents, other.latents)


def test_a_guided_teacher_is_asked_with_and_without_the_prompt_in_every_state(states: States) -> None:
    empty = 2  # prompts 0 and 1, then the empty one
    assert sorted(states.prompt_index.tolist()) == [0, 0, 1, 1, *[empty] * 4]
    asked, free = states.latents[states.prompt_index != empty], states.latents[states.prompt_index == empty]
    distances = (asked[:, None] - free[None]).flatten(2).abs().amax(dim=2)
    assert torch.equal((distances == 0).sum(dim=0), torch.ones(4, dtype=torch.int64))
    assert torch.equal((distances == 0).sum(dim=1), torch.ones(4, dtype=torch.int64))


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_an_unguided_teacher_is_asked_only_with_the_prompt(scale: float, tiny: Model) -> None:
    model = replace(tiny, defaults=replace(tiny.defaults, guidance_scale=scale))
    assert sorted(sample_states(model, ["a red circle", "a square"], seed=0).prompt_index.tolist()) == [
        0,
        0,
        1,
        1,
    ]


def test_states_do_not_depend_on_how_many_pictures_are_sampled_at_once(tiny: Model) -> None:
    prompts = ["a red circle", "two squares", "a triangle"]
    steps: list[int] = []
    together, apart = (
        sample_states(tiny, prompts, seed=0, batch_size=size, on_step=lambda: steps.append(1))
        for size in (3, 2)
    )
    assert len(steps) == 2 + 2 * 2
    distances = (together.latents[:, None] - apart.latents[None]).flatten(2).abs().amax(dim=2)
    assert distances.min(dim=1).values.max() < 1e-4


def test_a_local_directory_does_not_hide_the_model_that_comes_with_the_tool(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shapes").symlink_to(tiny_path)
    monkeypatch.chdir(tmp_path)
    assert len(open_model("shapes").mmdit.blocks) == 16
    assert len(open_model("./shapes").mmdit.blocks) == 6


def test_a_model_opens_as_it_is_stored_where_that_is_asked_for(any_path: Path) -> None:
    whole, stored = open_model(str(any_path)), open_model(str(any_path), precision="stored")
    weights = stored.pipeline.transformer.state_dict()
    assert {item.dtype for item in weights.values()} == {stored.stored_dtype} == {whole.stored_dtype}
    for name, item in whole.pipeline.transformer.state_dict().items():
        assert torch.equal(item, weights[name].float())
    for part in stored.pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            assert {item.dtype for item in part.parameters()} == {stored.stored_dtype}


def test_a_transformer_in_shards_is_the_same(any_path: Path, tmp_path: Path) -> None:
    model = open_model(str(any_path), precision="stored")
    shutil.copytree(any_path, tmp_path / "model")
    part = tmp_path / "model/transformer"
    (part / "diffusion_pytorch_model.safetensors").unlink()
    model.pipeline.transformer.save_pretrained(part, max_shard_size="50KB")
    assert len(list(part.glob("*.safetensors"))) > 1
    again = open_model(str(tmp_path / "model"))
    for name, item in open_model(str(any_path)).pipeline.transformer.state_dict().items():
        assert torch.equal(item, again.pipeline.transformer.state_dict()[name])


@pytest.mark.parametrize(("embeds", "expected"), [(True, (28, 3.5, 512)), (False, (4, 0.0, 512))])
def test_flux_that_says_nothing_of_itself_runs_as_it_was_distilled(
    embeds: bool, expected: tuple[int, float, int], tiny_flux_path: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    shutil.copytree(tiny_flux_path, path)
    (path / "generation_defaults.json").unlink()
    model = open_model(str(path))
    if embeds:
        config = {**model.pipeline.transformer.config, "guidance_embeds": True}
        transformer = type(model.pipeline.transformer).from_config(config)
        transformer.save_pretrained(path / "transformer")
        model = open_model(str(path))
    found = model.defaults
    assert (found.num_inference_steps, found.guidance_scale, found.max_sequence_length) == expected
    assert (found.height, model.latent_shape, model.guided) == (1024, (8, 128, 128), False)


def test_a_tied_weight_is_not_missed_but_one_of_t5_is(tiny_sd35_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(tiny_sd35_path, path)
    weights = path / "text_encoder_3/model.safetensors"
    assert "encoder.embed_tokens.weight" not in load_file(weights)
    open_model(str(path))
    rewrite(weights, lambda tensors: tensors.pop("encoder.final_layer_norm.weight"))
    with pytest.raises(ToolchainError, match=r"lacks weights of its text_encoder_3: encoder\.final_layer"):
        open_model(str(path))


def test_tensors_are_found_under_the_names_that_published_files_have(tmp_path: Path) -> None:
    config = CLIPTextConfig(
        vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1
    )
    clip = CLIPTextModel(config)
    t5 = T5EncoderModel(T5Config(vocab_size=8, d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1))
    table = torch.arange(config.max_position_embeddings)[None]
    published = {f"text_model.{name}": tensor for name, tensor in clip.state_dict().items()}
    save_file(published | {"text_model.embeddings.position_ids": table}, tmp_path / "model.safetensors")
    found = StoredTensors("clip", tmp_path, clip, stored_names(clip))
    for name, tensor in clip.state_dict().items():
        assert torch.equal(found[name], tensor)
    once = {name: tensor for name, tensor in t5.state_dict().items() if name != "encoder.embed_tokens.weight"}
    save_file(once, tmp_path / "model.safetensors")
    found = StoredTensors("t5", tmp_path, t5, stored_names(t5))
    assert torch.equal(found["encoder.embed_tokens.weight"], once["shared.weight"])
    del once["encoder.final_layer_norm.weight"]
    save_file(once, tmp_path / "model.safetensors")
    with pytest.raises(ToolchainError, match=r"lacks weights of its .*: encoder\.final_layer_norm\.weight"):
        StoredTensors("t5", tmp_path, t5, stored_names(t5))


def test_a_truncated_shard_and_another_models_tensor_are_refused(tiny_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(tiny_path, path)
    weights = next((path / "transformer").glob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ToolchainError, match=r"cannot be read: .*save .* again"):
        open_model(str(path), precision="none")
    weights.write_bytes(whole)
    config = json.loads((path / "transformer" / "config.json").read_text())
    config["joint_attention_dim"] += 1
    (path / "transformer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ToolchainError, match=r"context_embedder.weight of its transformer as \["):
        open_model(str(path), precision="none")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_that_someone_else_quantised_are_refused(
    tiny_path: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    path = tmp_path / "model"
    shutil.copytree(tiny_path, path)
    file = next((path / "transformer").glob("*.safetensors"))
    weights = load_file(file)
    weights["context_embedder.weight"] = weights["context_embedder.weight"].to(dtype)
    save_file(weights, file)
    with pytest.raises(
        ToolchainError, match=r"context_embedder\.weight of its transformer as (F8_E4M3|I8), and"
    ):
        open_model(str(path), precision="none")


def test_a_model_without_its_weights_has_them_all_on_disk(tiny_path: Path) -> None:
    whole, empty = open_model(str(tiny_path)), open_model(str(tiny_path), precision="none")
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert {item.device.type for item in getattr(empty.pipeline, part).parameters()} == {"meta"}
        read, held = empty.weights(part), whole.weights(part)
        assert read.keys() == held.keys()
        assert all(torch.equal(read[name].float(), held[name].float()) for name in held)


def test_whether_a_tensor_is_there_is_told_without_reading_it(tiny_path: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_path, tmp_path / "model")
    weights = open_model(str(path), precision="none").weights("transformer")
    for file in path.glob("transformer/*.safetensors"):
        file.unlink()
    assert "context_embedder.weight" in weights
    assert "weight" not in weights


def test_the_memory_that_states_take_is_known_before_they_are_made(tiny: Model) -> None:
    states = sample_states(tiny, ["a red circle", "two squares"], seed=0)
    rows = (states.latents, states.timesteps, states.velocities, states.prompt_index)
    text = states.text.tokens_BTJ.nbytes + states.text.pooled_BP.nbytes
    assert state_bytes(tiny, 2) == 2 * sum(item.nbytes for item in rows) + text
