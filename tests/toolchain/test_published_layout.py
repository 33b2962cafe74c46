"""Checkpoints of the layout in which Stable Diffusion 3.5 is published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

from toolchain.families import open_model
from toolchain.families.view import save_model
from toolchain.geometry import Unit
from toolchain.plan import CompressionPlan
from toolchain.prune import prune
from toolchain.trajectories import sample_states


def test_a_checkpoint_with_t5_in_bfloat16_gives_such_a_student(tiny_sd35_path: Path, tmp_path: Path) -> None:
    teacher = open_model(str(tiny_sd35_path))
    assert (teacher.stored_dtype, teacher.world, teacher.defaults.guidance_scale) == (torch.bfloat16, None, 7)
    teacher = replace(teacher, defaults=replace(teacher.defaults, num_inference_steps=1, height=64, width=64))
    states = sample_states(teacher, ["a big cab"], seed=0)
    num_clip_tokens, num_t5_tokens = 16, 256
    assert states.text.tokens_BTJ.shape[1] == num_clip_tokens + num_t5_tokens

    plan = CompressionPlan(
        model="sd35",
        geometry=teacher.geometry,
        semantics="zero",
        rule="manual",
        removed=(Unit(2), Unit(4)),
        strength={"embedders": 0.0, "head": 1.0, **{str(index): 1.0 for index in (0, 1, 3, 5)}},
        asked={},
    )
    save_model(prune(teacher, plan), tmp_path)
    plain = StableDiffusion3Pipeline.from_pretrained(tmp_path)
    assert plain.text_encoder_3 is not None
    assert plain.transformer.config.num_layers == 4
    assert open_model(str(tmp_path)).stored_dtype == torch.bfloat16
