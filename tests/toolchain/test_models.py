"""Opening, pruning, saving and teaching models, on a tiny pipeline with random weights."""

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
from diffusers import StableDiffusion3Pipeline
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from toolchain.analysis import analyze, velocity_errors
from toolchain.distill import distill_
from toolchain.errors import ToolchainError
from toolchain.families import GenerationDefaults, Model, open_model
from toolchain.families.sd3 import block_parameters, velocity, without_blocks
from toolchain.families.view import save_model_
from toolchain.optimize import Schedule
from toolchain.plan import CompressionPlan
from toolchain.prune import freeze_preserved_, prune
from toolchain.trajectories import States, sample_states

PLAN = CompressionPlan(
    model="tiny",
    num_blocks=6,
    removed_blocks=(2, 4),
    frozen_blocks=(0, 1),
    ratio_asked=0.3,
    ratio_reached=0.3,
)


def test_a_name_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="there is no model 'nosuch'"):
        open_model("nosuch")
    with pytest.raises(ToolchainError, match=r"without model_index\.json"):
        open_model(str(tmp_path))


def test_an_unsupported_class_is_named_with_what_is_supported(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ToolchainError, match="is a FluxPipeline; supported: StableDiffusion3Pipeline"):
        open_model(str(tmp_path))


def test_unknown_generation_defaults_are_refused(tiny_path: Path, tmp_path: Path) -> None:
    for part in tiny_path.iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "generation_defaults.json").unlink()
    (tmp_path / "generation_defaults.json").write_text(json.dumps({"schema_version": 1, "steps": 4}))
    with pytest.raises(ToolchainError, match=r"has the keys \['steps'\]"):
        open_model(str(tmp_path))


def test_a_view_without_blocks_shares_weights_and_leaves_the_model_whole(tiny: Model) -> None:
    whole = tiny.pipeline.transformer
    part = without_blocks(whole, [2, 4])
    assert [id(block) for block in part.transformer_blocks] == [
        id(whole.transformer_blocks[index]) for index in (0, 1, 3, 5)
    ]
    assert (part.config.num_layers, whole.config.num_layers) == (4, 6)
    assert len(whole.transformer_blocks) == 6


def test_dual_attention_layers_are_renumbered(tiny: Model) -> None:
    tiny.pipeline.transformer.register_to_config(dual_attention_layers=(0, 1, 2, 3))
    part = without_blocks(tiny.pipeline.transformer, [1, 4])
    assert part.config.dual_attention_layers == (0, 1, 2)


def test_plain_diffusers_loads_a_student_and_paints_the_same(tiny: Model, tmp_path: Path) -> None:
    save_model_(prune(tiny, PLAN), tmp_path)
    plain = StableDiffusion3Pipeline.from_pretrained(tmp_path, text_encoder_3=None, tokenizer_3=None)
    plain.set_progress_bar_config(disable=True)
    student = open_model(str(tmp_path))
    noise = np.random.default_rng(0).standard_normal((1, *student.latent_shape), dtype=np.float32)
    defaults = student.defaults
    picture = plain(
        ["a red circle"],
        num_inference_steps=defaults.num_inference_steps,
        guidance_scale=defaults.guidance_scale,
        max_sequence_length=0,
        height=64,
        width=64,
        latents=torch.from_numpy(noise),
        output_type="np",
    ).images
    assert plain.transformer.config.num_layers == 4
    assert np.array_equal((picture * 255).round().astype("uint8"), student.paint(["a red circle"], noise))


def test_a_student_keeps_the_precision_its_teacher_is_stored_in(tiny: Model, tmp_path: Path) -> None:
    save_model_(prune(tiny, PLAN), tmp_path)
    assert open_model(str(tmp_path)).stored_dtype == torch.float16
    size = (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size == pytest.approx(2 * open_model(str(tmp_path)).num_parameters, rel=0.05)


def test_states_hold_what_the_teacher_says_there(tiny: Model, states: States) -> None:
    latents, timesteps, text, said = states.batch(slice(None))
    with torch.no_grad():
        again = velocity(tiny.pipeline.transformer, latents, timesteps, text)
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


def test_removing_nothing_does_no_harm(tiny: Model, states: States) -> None:
    assert velocity_errors(tiny.pipeline.transformer, states).max() < 1e-8


def test_a_block_that_does_nothing_is_found_harmless(tiny: Model) -> None:
    block = tiny.pipeline.transformer.transformer_blocks[3]
    for gate in (block.norm1, block.norm1_context):  # gates come from here: zero gates, no residual
        torch.nn.init.zeros_(gate.linear.weight)
        torch.nn.init.zeros_(gate.linear.bias)
    harms = [item.harm for item in analyze(tiny, sample_states(tiny, ["two squares"], seed=0), seed=0).blocks]
    assert harms[3] < 1e-10
    assert min(harm for index, harm in enumerate(harms) if index != 3) > 1e-6


def test_distillation_brings_the_student_nearer_and_keeps_the_rest(tiny: Model, states: States) -> None:
    before = {name: item.clone() for name, item in tiny.pipeline.transformer.state_dict().items()}
    student = prune(tiny, PLAN)
    transformer = student.pipeline.transformer
    pruned = {name: item.clone() for name, item in transformer.state_dict().items()}
    freeze_preserved_(student, PLAN)
    wrong = float(velocity_errors(transformer, states).mean())
    schedule = Schedule(steps=30, learning_rate=1e-3, warmup_steps=2)
    distill_(student, states, schedule, batch_size=8, seed=0)
    assert float(velocity_errors(transformer, states).mean()) < 0.5 * wrong

    changed = {name for name, item in transformer.state_dict().items() if not torch.equal(item, pruned[name])}
    preserved = (
        "transformer_blocks.0.",
        "transformer_blocks.1.",
        "pos_embed",
        "time_text_embed",
        "context_e",
    )
    assert changed
    assert not [name for name in changed if name.startswith(preserved)]
    for name, item in tiny.pipeline.transformer.state_dict().items():
        assert torch.equal(item, before[name])


def test_parameters_of_the_blocks_add_up(tiny: Model) -> None:
    transformer = tiny.pipeline.transformer
    outside = sum(
        item.numel() for name, item in transformer.named_parameters() if "transformer_blocks" not in name
    )
    assert sum(block_parameters(transformer)) + outside == tiny.num_parameters


def change(path: Path, **values: object) -> None:
    """Change keys of a JSON file; None takes one out."""
    data = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def rewrite(path: Path, alter: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    alter(tensors)
    save_file(tensors, path, {"format": "pt"})


TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


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


def test_removing_no_block_changes_nothing(tiny: Model, states: States) -> None:
    latents, timesteps, text, _ = states.batch(slice(None))
    whole = tiny.pipeline.transformer
    with torch.no_grad():
        same = velocity(without_blocks(whole, []), latents, timesteps, text)
        assert torch.equal(same, velocity(whole, latents, timesteps, text))


def test_saving_and_opening_a_student_changes_no_pixel(tiny: Model, tmp_path: Path) -> None:
    """What it was opened from is in 16 bits, so these weights lose nothing when they are stored again."""
    student = prune(tiny, PLAN)
    noise = np.random.default_rng(1).standard_normal((1, *student.latent_shape), dtype=np.float32)
    before = student.paint(["two blue squares"], noise)
    save_model_(student, tmp_path)
    again = open_model(str(tmp_path))
    assert np.ptp(before) > 0
    assert np.array_equal(again.paint(["two blue squares"], noise), before)
    assert (again.defaults, again.world) == (student.defaults, "shapes")


def test_a_saved_model_is_readable_by_all_and_free_of_pickles_and_paths(tiny: Model, tmp_path: Path) -> None:
    save_model_(prune(tiny, PLAN), tmp_path)
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


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_sampling_ends_where_the_pipeline_ends(scale: float, tiny: Model) -> None:
    model = replace(tiny, defaults=replace(tiny.defaults, guidance_scale=scale, num_inference_steps=3))
    states = sample_states(model, ["a red circle"], seed=3)
    last = states.timesteps == states.timesteps.min()
    velocities = {
        int(index): said
        for index, said in zip(states.prompt_index[last], states.velocities[last], strict=True)
    }
    asked, free = velocities[0], velocities.get(1, velocities[0])
    sigma = states.timesteps.min() / 1000  # the step after the last one goes to 0
    ended = states.latents[last][0] - sigma * (free + scale * (asked - free))

    noise = np.random.default_rng(3).standard_normal((1, *model.latent_shape), dtype=np.float32)
    expected = model.pipeline(
        ["a red circle"],
        num_inference_steps=3,
        guidance_scale=scale,
        max_sequence_length=0,
        height=64,
        width=64,
        latents=torch.from_numpy(noise),
        output_type="latent",
    ).images[0]
    torch.testing.assert_close(ended, expected, rtol=1e-4, atol=1e-4)


def test_errors_do_not_depend_on_the_batch(tiny: Model, states: States) -> None:
    pruned = without_blocks(tiny.pipeline.transformer, [3])
    one, all_at_once = (velocity_errors(pruned, states, batch_size=size) for size in (1, 64))
    assert one.shape == (len(states),)
    assert all_at_once.min() > 1e-6
    torch.testing.assert_close(one, all_at_once, rtol=1e-3, atol=1e-8)


def test_an_analysis_is_of_each_block_alone_and_leaves_the_model_whole(tiny: Model, states: States) -> None:
    transformer = tiny.pipeline.transformer
    before = {name: item.clone() for name, item in transformer.state_dict().items()}
    done: list[int] = []
    found = analyze(tiny, states, seed=5, on_block=lambda: done.append(1))
    assert [item.block for item in found.blocks] == list(range(6))
    assert [item.num_parameters for item in found.blocks] == block_parameters(transformer)
    assert (found.total_parameters, found.num_states, found.seed) == (tiny.num_parameters, 8, 5)
    assert len(done) == 6
    alone = velocity_errors(without_blocks(transformer, [3]), states)
    assert found.blocks[3].harm == float(alone.mean())
    assert found.blocks[3].standard_error == pytest.approx(float(alone.std()) / 8**0.5)
    assert transformer.config.num_layers == len(transformer.transformer_blocks) == 6
    assert all(torch.equal(item, before[name]) for name, item in transformer.state_dict().items())


def test_a_distillation_that_was_stopped_ends_as_an_undisturbed_one(
    tiny: Model, states: States, tmp_path: Path
) -> None:
    schedule = Schedule(steps=4, learning_rate=1e-3, warmup_steps=0, checkpoint_every=2)

    def stop(step: int, _: float) -> None:
        if step == 2:
            raise KeyboardInterrupt

    def taught(*stops: bool) -> dict[str, torch.Tensor]:
        student = prune(tiny, PLAN)
        freeze_preserved_(student, PLAN)
        state = tmp_path / "state.safetensors" if stops else None
        on_step = stop if any(stops) else None
        distill_(student, states, schedule, batch_size=4, seed=1, checkpoint=state, on_step=on_step)
        return dict(student.pipeline.transformer.state_dict())

    with pytest.raises(KeyboardInterrupt):
        taught(True)
    resumed, undisturbed = taught(False), taught()
    assert resumed.keys() == undisturbed.keys()
    assert all(torch.equal(item, undisturbed[name]) for name, item in resumed.items())


def test_a_student_shares_no_weight_that_learns_with_its_teacher(tiny: Model) -> None:
    student = prune(tiny, PLAN)
    teacher = {item.data_ptr() for item in tiny.pipeline.transformer.parameters()}
    assert not teacher & {item.data_ptr() for item in student.pipeline.transformer.parameters()}
    assert tiny.pipeline.transformer.config.num_layers == 6
