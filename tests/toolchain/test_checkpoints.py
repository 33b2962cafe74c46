"""Checkpoints of the layout in which Stable Diffusion 3.5 is published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

from toolchain.families import open_model
from toolchain.families.view import save_model_
from toolchain.plan import CompressionPlan
from toolchain.prune import prune
from toolchain.trajectories import sample_states

PLAN = CompressionPlan(
    model="sd35",
    num_blocks=6,
    removed_blocks=(2, 4),
    frozen_blocks=(0, 1),
    ratio_asked=0.3,
    ratio_reached=0.3,
)


def test_a_checkpoint_with_t5_in_bfloat16_gives_such_a_student(tiny_sd35_path: Path, tmp_path: Path) -> None:
    teacher = open_model(str(tiny_sd35_path))
    assert (teacher.stored_dtype, teacher.world, teacher.defaults.guidance_scale) == (torch.bfloat16, None, 7)
    teacher = replace(teacher, defaults=replace(teacher.defaults, num_inference_steps=1, height=64, width=64))
    states = sample_states(teacher, ["a big cab"], seed=0)
    num_clip_tokens, num_t5_tokens = 16, 256
    assert states.text.tokens_BTJ.shape[1] == num_clip_tokens + num_t5_tokens

    save_model_(prune(teacher, PLAN), tmp_path)
    plain = StableDiffusion3Pipeline.from_pretrained(tmp_path)
    assert plain.text_encoder_3 is not None
    assert plain.transformer.config.num_layers == 4
    assert open_model(str(tmp_path)).stored_dtype == torch.bfloat16
