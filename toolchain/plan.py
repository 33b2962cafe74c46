"""The decision as data: which blocks go, which stay frozen, and why. Pure; no torch.

Hierarchical position pruning follows HierarchicalPrune (arXiv 2508.04663): the score of a block is the
harm of removing it, weighted by where it stands, since early blocks lay out the picture and late ones
refine it. As transcribed, the paper's weight exp((i - n) / n) grows with the position i and would
favour the early blocks its text protects; here harm is multiplied by exp(-i / n), which does what the
text says: of two blocks whose removal harms alike, the later one goes first.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from toolchain.errors import ToolchainError

PLAN_FILE = "plan.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class BlockSensitivity:
    """What removing one block alone does to the model."""

    block: int
    harm: float
    """Mean over the states of |v - v_teacher|^2 / |v_teacher|^2, v being the velocity."""
    standard_error: float
    num_parameters: int


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The contribution analysis of a model; the harm of removing nothing is 0 by construction."""

    model: str
    total_parameters: int
    """Of the whole transformer, which includes what lies outside its blocks."""
    num_states: int
    """How many states of the teacher's own sampling each harm is the mean of."""
    seed: int
    blocks: tuple[BlockSensitivity, ...]


@dataclass(frozen=True, kw_only=True)
class CompressionPlan:
    """What `prune` and `distil` obey; block numbers are the teacher's."""

    model: str
    num_blocks: int
    removed_blocks: tuple[int, ...]
    frozen_blocks: tuple[int, ...]
    """Kept, and kept as they are: everything before the first removed block (PWP)."""
    ratio_asked: float
    ratio_reached: float
    """Share of the transformer's parameters that goes."""

    @property
    def kept_blocks(self) -> tuple[int, ...]:
        """The student's blocks in order: the student's block k is the teacher's `kept_blocks[k]`."""
        return tuple(index for index in range(self.num_blocks) if index not in self.removed_blocks)


def build_plan(
    sensitivity: Sensitivity, *, ratio: float, protected_first: int = 2, protected_last: int = 1
) -> CompressionPlan:
    """Choose whole blocks until at least `ratio` of the transformer's parameters goes.

    Args:
        sensitivity: The analysis to decide by.
        ratio: Share of the transformer's parameters to remove, above 0 and below 1.
        protected_first: The first blocks, which lay out the picture, never go.
        protected_last: Nor the last ones; at least 1, for the last block ends without a text stream.

    Raises:
        ToolchainError: `ratio` is out of range, or more than the unprotected blocks hold.
    """
    check_ratio(ratio)
    num_blocks = len(sensitivity.blocks)
    candidates = [
        item for item in sensitivity.blocks if protected_first <= item.block < num_blocks - protected_last
    ]
    candidates.sort(key=lambda item: item.harm * math.exp(-item.block / num_blocks))
    available = sum(item.num_parameters for item in candidates) / sensitivity.total_parameters
    if ratio > available:
        raise ToolchainError(
            f"ratio {ratio} is out of reach: the {len(candidates)} blocks that may go hold only "
            f"{available:.3f} of the transformer's parameters"
        )
    removed: list[int] = []
    gone = 0
    for item in candidates:
        if gone >= ratio * sensitivity.total_parameters:
            break
        removed.append(item.block)
        gone += item.num_parameters
    return CompressionPlan(
        model=sensitivity.model,
        num_blocks=num_blocks,
        removed_blocks=tuple(sorted(removed)),
        frozen_blocks=tuple(range(min(removed))),
        ratio_asked=ratio,
        ratio_reached=gone / sensitivity.total_parameters,
    )


def check_ratio(ratio: float) -> None:
    """Refuse a ratio that no plan could reach, before any work is done.

    Raises:
        ToolchainError: It is not above 0 and below 1.
    """
    if not 0 < ratio < 1:
        raise ToolchainError(
            f"ratio {ratio} is out of range; it is the share of the transformer's parameters to remove, "
            "above 0 and below 1, e.g. 0.25"
        )


def plan_from_json(data: dict[str, Any]) -> CompressionPlan:
    """Read what `to_json` wrote, strictly.

    Raises:
        ToolchainError: It is of another schema, or has missing or unknown keys.
    """
    values = dict(data)
    fields = {field.name for field in dataclasses.fields(CompressionPlan)}
    if values.pop("schema_version", None) != SCHEMA_VERSION or set(values) != fields:
        raise ToolchainError(
            f"this is no plan of schema version {SCHEMA_VERSION}: it has the keys {sorted(data)}, "
            f"expected schema_version and {sorted(fields)}"
        )
    blocks = {name: tuple(values[name]) for name in ("removed_blocks", "frozen_blocks")}
    return CompressionPlan(**{**values, **blocks})


def to_json(value: Sensitivity | CompressionPlan) -> dict[str, Any]:
    """A plan or an analysis as the object its file holds."""
    return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(value)}
