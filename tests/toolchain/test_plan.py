"""What goes and what stays, decided without a model."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.errors import ToolchainError
from toolchain.plan import (
    BlockSensitivity,
    Sensitivity,
    build_plan,
    plan_from_json,
    to_json,
)


def sensitivity(harms: list[float]) -> Sensitivity:
    blocks = tuple(
        BlockSensitivity(block=index, harm=harm, standard_error=0.0, num_parameters=10)
        for index, harm in enumerate(harms)
    )
    return Sensitivity(model="m", total_parameters=10 * len(harms) + 5, num_states=1, seed=0, blocks=blocks)


@given(st.lists(st.floats(0, 10), min_size=6, max_size=40), st.floats(0.01, 0.4))
def test_at_least_the_ratio_goes_and_less_than_a_block_more(harms: list[float], ratio: float) -> None:
    plan = build_plan(sensitivity(harms), ratio=ratio)
    total = 10 * len(harms) + 5
    assert ratio <= plan.ratio_reached < ratio + 10 / total
    assert sorted({*plan.kept_blocks, *plan.removed_blocks}) == list(range(len(harms)))
    assert not {0, 1, len(harms) - 1} & set(plan.removed_blocks)
    assert plan.frozen_blocks == tuple(range(min(plan.removed_blocks)))


def test_the_least_harmful_block_goes_first() -> None:
    assert build_plan(sensitivity([0, 0, 9, 1, 9, 9, 0]), ratio=0.1).removed_blocks == (3,)


def test_of_equal_harms_the_later_block_goes_first() -> None:
    assert build_plan(sensitivity([1.0] * 8), ratio=0.2).removed_blocks == (5, 6)


@pytest.mark.parametrize("ratio", [-0.1, 0.0, 0.9, 1.0, 1.5, float("nan")])
def test_a_ratio_out_of_reach_is_refused(ratio: float) -> None:
    with pytest.raises(ToolchainError, match="out of range"):
        build_plan(sensitivity([1.0] * 8), ratio=ratio)


def test_a_plan_reads_as_it_was_written() -> None:
    plan = build_plan(sensitivity([1.0] * 8), ratio=0.2)
    assert plan_from_json(json.loads(json.dumps(to_json(plan)))) == plan


@pytest.mark.parametrize("change", [{"more": 1}, {"schema_version": 99}])
def test_a_plan_of_another_schema_is_refused(change: dict[str, int]) -> None:
    data = to_json(build_plan(sensitivity([1.0] * 8), ratio=0.2)) | change
    with pytest.raises(ToolchainError, match="no plan of schema version 1"):
        plan_from_json(data)
