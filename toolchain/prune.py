"""Making the student a plan describes."""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import nn

from toolchain.errors import ToolchainError
from toolchain.families.view import Model
from toolchain.plan import EMBEDDERS, CompressionPlan


def prune(model: Model, plan: CompressionPlan, *, share_prefix: bool = False) -> Model:
    """The student a plan describes; the teacher is left as it is.

    Args:
        model: The teacher.
        plan: What goes.
        share_prefix: Whether the student's embedders and the blocks of `plan.shared_prefix`, which are the
            teacher's for good, lie in the teacher's memory instead of a copy.

    Raises:
        ToolchainError: The plan is of another model.
    """
    check_plan(model, plan)
    view = model.mmdit.without(plan.removed, plan.semantics)
    shared: dict[int, object] = {}
    if share_prefix:
        # The weights are the teacher's, the parameters are not: a cast of one model leaves the other alone.
        units = [EMBEDDERS, *map(str, range(plan.shared_prefix))] if plan.shared_prefix else []
        for parameter in (item for unit in units for item in view.parameters_of(unit)):
            shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
        shared |= {id(buffer): buffer for buffer in view.transformer.buffers()}
    transformer = copy.deepcopy(view.transformer, shared)
    parts = {**model.pipeline.components, "transformer": transformer}
    student = type(model.pipeline)(**parts)
    student.set_progress_bar_config(disable=True)
    return replace(model, pipeline=student)


def check_plan(model: Model, plan: CompressionPlan) -> None:
    """Refuse a plan that was made for another model, before any work is done.

    Raises:
        ToolchainError: Family, blocks, components or parameters differ.
    """
    own, planned = model.geometry, plan.geometry
    differences = [
        f"{name} {there} where the model has {here}"
        for name, there, here in (
            ("family", planned.family, own.family),
            ("blocks", len(planned.blocks), len(own.blocks)),
            ("parameters", planned.size.parameters, own.size.parameters),
        )
        if there != here
    ]
    differences += [
        f"components of block {index} {', '.join(there.components)} where the model has "
        f"{', '.join(here.components)}"
        for index, (there, here) in enumerate(zip(planned.blocks, own.blocks, strict=False))
        if there.components != here.components
    ]
    if differences:
        raise ToolchainError(
            f"the plan is of {plan.model}, not of {model.source}: {'; '.join(differences[:3])}; plan again"
        )
