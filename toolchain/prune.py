"""Making the student a plan describes, and choosing what of it may learn."""

from __future__ import annotations

import copy
from dataclasses import replace

from toolchain.families.sd3 import without_blocks
from toolchain.families.view import Model
from toolchain.plan import CompressionPlan


def prune(model: Model, plan: CompressionPlan) -> Model:
    """A student with its own copy of the weights of the blocks that stay; the teacher is left as it is."""
    teacher = model.pipeline
    transformer = copy.deepcopy(without_blocks(teacher.transformer, plan.removed_blocks))
    parts = {**teacher.components, "transformer": transformer}
    student = type(teacher)(**parts)
    student.set_progress_bar_config(disable=True)
    return replace(model, pipeline=student)


def freeze_preserved_(student: Model, plan: CompressionPlan) -> None:
    """Positional weight preservation: only what follows the first removed block may learn.

    The embedders lie before every block, so they stay too.
    """
    transformer = student.pipeline.transformer
    transformer.requires_grad_(False)
    for index, block in enumerate(transformer.transformer_blocks):
        block.requires_grad_(plan.kept_blocks[index] not in plan.frozen_blocks)
    transformer.norm_out.requires_grad_(True)
    transformer.proj_out.requires_grad_(True)
