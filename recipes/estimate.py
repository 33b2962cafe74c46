"""What a recipe takes, computed from its model's geometry before anything is downloaded.

Hours are floating-point operations over a share of the GPU's peak. They say how two recipes compare, and how
many days to plan for; they are no measurement.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, get_args

from profiles.schema import load_profile
from recipes.schema import Recipe
from toolchain.errors import ToolchainError
from toolchain.footprint import DistillMemory, Mode, memory_arithmetic
from toolchain.plan import StrengthMode, unmeasured
from toolchain.rules import Budget, Options, build_plan, check_budget, parse_units

if TYPE_CHECKING:
    from toolchain.geometry import Geometry
    from toolchain.plan import CompressionPlan

__all__ = ["Estimate", "estimate", "plan_of"]

UTILISATION = 0.4
"""Share of a GPU's peak that training is taken to reach."""
GPUS = ("a100", "h100")
"""Profiles of the GPUs that hours are given for."""
SHARDS = 8
"""Devices over which weights, gradients and moments are divided where they are sharded."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What following a recipe takes."""

    plan: CompressionPlan
    """What goes, or is assumed to go."""
    memory: dict[Mode, DistillMemory]
    """Of one device with one state at a time, by what the two models share."""
    state_bytes: int
    """What each further state on the device at once adds."""
    analysis_flops: float
    """Removing each block and component once; measuring again after removals comes on top."""
    teaching_flops: float
    """All steps, the teacher asked for its velocity in each."""
    two_model_flops: float
    """The same where teacher and student share nothing."""

    @property
    def sharded_bytes(self) -> int:
        """Of each of `SHARDS` devices with one state, the prefix shared; the block that is being
        computed, there as a whole, is not counted."""
        held = self.memory["shared"]
        own = held.activations + held.teacher_features
        return own + (held.total - own) // SHARDS

    def hours(self, flops: float) -> dict[str, float]:
        """Hours of one GPU, by its profile."""
        return {name: flops / (load_profile(name).peak_tflops * 1e12 * UTILISATION * 3600) for name in GPUS}

    @property
    def as_data(self) -> dict[str, Any]:
        """What there is to print."""
        sizes = self.plan.sizes
        return {
            "parameters": {when: sizes[when]["parameters"] for when in ("before", "after")},
            "ratio": self.plan.ratio_reached,
            "flops_ratio": self.plan.flops_ratio_reached,
            "shared_blocks": self.plan.shared_prefix,
            "memory": {mode: asdict(item) | {"total": item.total} for mode, item in self.memory.items()},
            "sharded_bytes": self.sharded_bytes,
            "state_bytes": self.state_bytes,
            "gpu_hours": {
                "analysis": self.hours(self.analysis_flops),
                "teaching": self.hours(self.teaching_flops),
                "teaching, two models": self.hours(self.two_model_flops),
            },
        }


def estimate(recipe: Recipe) -> Estimate:
    """Compute what a recipe takes, from the configuration of its model alone.

    Raises:
        ToolchainError: The recipe does not fit its model.
    """
    model = _described(recipe.model)
    geometry = model.geometry
    plan = plan_of(recipe, geometry)
    options: dict[str, Any] = {
        "inner_width": model.inner_width,
        "features": recipe.features > 0,
        "frozen_bytes": 2 if recipe.precision == "stored" else 4,
        # The average lies beside the two moments.
        "moment_bytes": 8 if recipe.ema is None else 12,
        "checkpointing": recipe.checkpointing,
    }
    memory = {mode: memory_arithmetic(plan, mode=mode, **options) for mode in get_args(Mode)}
    again = memory_arithmetic(plan, mode="shared", batch_size=2, **options).total - memory["shared"].total

    blocks = [block.flops for block in geometry.blocks]
    whole, student = geometry.size.flops, plan.reached.flops
    tail = student - sum(blocks[: plan.shared_prefix])
    # A backward pass takes two forward ones, and with checkpointing a third that makes activations again.
    learning = (2 + recipe.checkpointing) * tail
    states = recipe.steps * recipe.batch_size
    # What stands before a removal is computed once for all that may go there.
    removals = sum(
        (1 + len(block.components)) * sum(blocks[index:]) for index, block in enumerate(geometry.blocks)
    )
    analysis = recipe.num_prompts * model.passes * (whole + removals)
    return Estimate(
        plan=plan,
        memory=memory,
        state_bytes=again,
        analysis_flops=analysis if recipe.remove is None else 0.0,
        teaching_flops=states * (whole + tail + learning),
        two_model_flops=states * (whole + student + learning),
    )


@dataclass(frozen=True, kw_only=True)
class _Described:
    """What there is to know of a model without its weights."""

    geometry: Geometry
    inner_width: int
    passes: int
    """Of one picture."""


@cache
def _described(source: str) -> _Described:
    from toolchain.families import open_model

    model = open_model(source, precision="config")
    return _Described(
        geometry=model.geometry,
        inner_width=model.pipeline.transformer.inner_dim,
        passes=model.defaults.num_inference_steps * (2 if model.guided else 1),
    )


def plan_of(recipe: Recipe, geometry: Geometry) -> CompressionPlan:
    """What a recipe removes, or assumes to.

    Raises:
        ToolchainError: There are no such parts, its ratio is out of reach, or it assumes less than that.
    """
    if recipe.ratio is not None:
        check_budget(geometry, recipe.semantics, Budget(ratio=recipe.ratio), rule=recipe.rule)
    units = parse_units(recipe.remove or recipe.assumes or "", geometry)
    # Without an analysis there is no telling how strongly a part learns, but this is what learns at all.
    learns: StrengthMode = "none" if recipe.strengths in ("none", "graded") else "pwp"
    plan = build_plan(
        unmeasured(recipe.model, geometry, recipe.semantics),
        rule="manual",
        options=Options(units=units),
        mode=learns,
    )
    if recipe.ratio is not None and plan.ratio_reached < recipe.ratio:
        raise ToolchainError(
            f"the recipe {recipe.name} is to remove {recipe.ratio:.3f} of {recipe.model}, but what it "
            f"assumes to go is only {plan.ratio_reached:.3f}; let assumes name more"
        )
    return plan
