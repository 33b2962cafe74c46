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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.errors import ToolchainError

PLAN_FILE = "plan.json"
SCHEMA_VERSION = 1

# The first blocks lay out the picture; the last one ends without a text stream, as no other does.
_PROTECTED_FIRST, _PROTECTED_LAST = 2, 1


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


def build_plan(sensitivity: Sensitivity, *, ratio: float) -> CompressionPlan:
    """Choose whole blocks until at least `ratio` of the transformer's parameters goes.

    Raises:
        ToolchainError: `check_ratio` refuses the ratio.
    """
    num_blocks = len(sensitivity.blocks)
    check_ratio(ratio, [item.num_parameters for item in sensitivity.blocks], sensitivity.total_parameters)
    removed: list[int] = []
    gone = 0
    for item in sorted(
        (sensitivity.blocks[index] for index in _removable(num_blocks)),
        key=lambda item: (item.harm * math.exp(-item.block / num_blocks), -item.block),
    ):
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


def check_ratio(ratio: float, block_parameters: Sequence[int], total_parameters: int) -> None:
    """Refuse a ratio that no plan could reach, before any work is done.

    Args:
        ratio: Share of the transformer's parameters to remove.
        block_parameters: Of every block in order.
        total_parameters: Of the whole transformer.

    Raises:
        ToolchainError: It is not above 0, or more than the blocks that may go hold.
    """
    removable = sum(block_parameters[index] for index in _removable(len(block_parameters)))
    available = removable / total_parameters
    if not 0 < ratio <= available:
        raise ToolchainError(
            f"ratio {ratio} is out of range; it is the share of the transformer's parameters to remove, "
            f"above 0 and, as the first {_PROTECTED_FIRST} blocks and the last stay, at most {available:.3f}"
        )


def _removable(num_blocks: int) -> range:
    return range(_PROTECTED_FIRST, num_blocks - _PROTECTED_LAST)


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
