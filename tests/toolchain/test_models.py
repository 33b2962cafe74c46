"""Opening, pruning, saving and teaching models, on a tiny pipeline with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from toolchain.analysis import analyze, velocity_errors
from toolchain.distill import distill_
from toolchain.errors import ToolchainError
from toolchain.families import Model, open_model
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
