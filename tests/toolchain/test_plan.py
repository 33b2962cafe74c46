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


def sensitivity(harms: list[float], sizes: list[int] | None = None) -> Sensitivity:
    sizes = sizes or [10] * len(harms)
    blocks = tuple(
        BlockSensitivity(block=index, harm=harm, standard_error=0.0, num_parameters=size)
        for index, (harm, size) in enumerate(zip(harms, sizes, strict=True))
    )
    return Sensitivity(model="m", total_parameters=sum(sizes) + 5, num_states=1, seed=0, blocks=blocks)


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


@given(
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 1000)), min_size=4, max_size=40),
    st.floats(0.01, 1),
)
def test_blocks_of_any_sizes_reach_every_ratio_that_is_offered(
    blocks: list[tuple[float, int]], share: float
) -> None:
    harms, sizes = [harm for harm, _ in blocks], [size for _, size in blocks]
    available = sum(sizes[2:-1]) / (sum(sizes) + 5)
    plan = build_plan(sensitivity(harms, sizes), ratio=share * available)
    gone = sum(sizes[index] for index in plan.removed_blocks)
    assert plan.ratio_reached == gone / (sum(sizes) + 5)
    assert plan.ratio_reached >= plan.ratio_asked * (1 - 1e-12)
    assert gone - plan.ratio_asked * (sum(sizes) + 5) < max(sizes[index] for index in plan.removed_blocks)


def test_all_that_may_go_goes_when_it_is_asked_for() -> None:
    assert build_plan(sensitivity([1.0] * 8), ratio=50 / 85).removed_blocks == (2, 3, 4, 5, 6)


def test_a_refusal_says_what_could_be_had() -> None:
    with pytest.raises(ToolchainError, match=r"ratio 0\.6 is out of range.* at most 0\.588"):
        build_plan(sensitivity([1.0] * 8), ratio=0.6)


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_of_three_blocks_or_fewer_none_can_go(num_blocks: int) -> None:
    with pytest.raises(ToolchainError, match=r"at most 0\.000"):
        build_plan(sensitivity([1.0] * num_blocks), ratio=0.1)


@pytest.mark.parametrize(("harm_of_5", "first"), [(1.3, 5), (1.6, 2)])
def test_a_later_block_may_harm_a_little_more_and_still_go_first(harm_of_5: float, first: int) -> None:
    # exp(-2/8) = 0.78 against harm_of_5 * exp(-5/8) = harm_of_5 * 0.54
    harms = [9, 9, 1.0, 9, 9, harm_of_5, 9, 9]
    assert build_plan(sensitivity(harms), ratio=0.1).removed_blocks == (first,)


def test_of_blocks_that_do_no_harm_at_all_the_later_goes_first() -> None:
    assert build_plan(sensitivity([0.0] * 8), ratio=0.2).removed_blocks == (5, 6)


def test_an_analysis_is_written_with_its_schema() -> None:
    data = json.loads(json.dumps(to_json(sensitivity([1.0, 2.0, 3.0, 4.0]))))
    assert data["schema_version"] == 1
    assert [block["harm"] for block in data["blocks"]] == [1.0, 2.0, 3.0, 4.0]
