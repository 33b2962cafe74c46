"""Plans and analyses as data: what they say, what they refuse, and how strongly what stays may learn."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.errors import ToolchainError
from toolchain.geometry import Block, Geometry, Part, Size, Unit
from toolchain.plan import (
    CompressionPlan,
    Harm,
    Sensitivity,
    StrengthMode,
    plan_from_json,
    sensitivity_from_json,
    strengths,
    to_json,
    unmeasured,
)

# Parameters and FLOPs; a block has 100 and 1000.
SIZES = {
    "attn": (40, 600),
    "ff": (30, 300),
    "ff_context": (20, 90),
    "norm1": (6, 6),
    "norm1_context": (4, 4),
}


def geometry(num_blocks: int = 4) -> Geometry:
    parts = tuple(
        Part(name=name, parameters=parameters, flops=flops, zero=((name,),), identity=((name,),))
        for name, (parameters, flops) in SIZES.items()
    )
    block = Block(kind="joint", components=tuple(SIZES), parts=parts)
    return Geometry(
        family="toy",
        blocks=(block,) * num_blocks,
        other_parameters=50,
        other_flops=500,
        height=64,
        width=64,
        text_tokens=7,
    )


def units(*names: str) -> tuple[Unit, ...]:
    return tuple(map(Unit.parse, names))


def sensitivity(harms: dict[str, float], num_blocks: int = 4) -> Sensitivity:
    return replace(
        unmeasured("m", geometry(num_blocks), "zero"),
        metric="velocity",
        settings={"seeds": [0]},
        harms=tuple(Harm(removed=units(name), harm=harm, standard_error=0.5) for name, harm in harms.items()),
    )


def plan(*removed: str, num_blocks: int = 4, **changes: Any) -> CompressionPlan:
    what = sensitivity({}, num_blocks)
    values: dict[str, Any] = {
        "model": "m",
        "geometry": what.geometry,
        "semantics": "zero",
        "rule": "manual",
        "removed": units(*removed),
        "strength": strengths(what, units(*removed), "pwp"),
        "asked": {"units": "…"},
    }
    return CompressionPlan(**(values | changes))


def test_a_plan_says_what_is_left() -> None:
    some = plan("2", "1.ff")
    assert some.kept_blocks == (0, 1, 3)
    assert some.removed_components == {1: frozenset({"ff"})}
    assert some.first_change == 1
    assert some.reached == Size(parameters=450 - 130, flops=4500 - 1300)
    assert some.ratio_reached == pytest.approx(130 / 450)
    assert some.flops_ratio_reached == pytest.approx(1300 / 4500)
    assert some.sizes == {
        "before": {"parameters": 450, "bytes_16_bit": 900, "bytes_4_bit": 225, "flops": 4500},
        "after": {"parameters": 320, "bytes_16_bit": 640, "bytes_4_bit": 160, "flops": 3200},
    }


def test_text_stream_and_norms_buy_memory_and_hardly_any_speed() -> None:
    some = plan("1.ff_context", "1.norm1", "1.norm1_context")
    assert some.ratio_reached == pytest.approx(30 / 450)
    assert some.flops_ratio_reached == pytest.approx(100 / 4500)


def test_a_block_is_gone_when_all_its_components_are() -> None:
    some = plan(*(f"2.{name}" for name in SIZES))
    assert some.kept_blocks == (0, 1, 3)
    assert some.removed_components == {}
    assert some.reached == plan("2").reached


def test_nothing_changes_where_nothing_goes() -> None:
    assert plan().first_change == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"removed": units("0", "1", "2", "3")}, "removes every block of the 4"),
        ({"removed": units("2", "2")}, "2 is removed twice"),
        ({"removed": units("2.ff", "2")}, r"2\.ff goes with block 2"),
        ({"removed": units("7")}, "there is no block 7: the model has the blocks 0 to 3"),
        ({"removed": units("2.fff")}, "has no component 'fff'; it has attn, ff"),
        ({"rule": "best"}, "unknown rule 'best'; there are hpp, "),
        ({"semantics": "one"}, "unknown semantics 'one'; there are zero, identity"),
        ({"strength": {"embedders": 0, "head": 1, "0": 0, "1": 1}}, r"say nothing of 3\.attn"),
        ({"strength": {"embedders": 0, "0": 0, "1": 1, "3": 1}}, "say nothing of head"),
        (
            {"strength": {"embedders": 0, "head": 1, "0": 0, "1": 1, "2": 1, "3": 1}},
            "strengths of 2: no such",
        ),
        ({"strength": {"embedders": 0, "head": 1, "0": 0, "1": 1.5, "3": 1}}, r"of 1\.attn is 1\.5"),
        ({"strength": {"embedders": 0, "head": 1, "0": 0, "1": float("nan"), "3": 1}}, r"1\.attn is nan"),
        ({"bits": {"2.ff": 8}}, r"bits of 2\.ff: no such component is kept; .* like 0\.attn"),
        ({"bits": {"1": 8}}, "bits of 1: no such component"),
        ({"bits": {"1.ff": 6}}, r"the bits of 1\.ff are 6; there are 4, 8 and 16"),
        ({"bits": {"1.ff": 8.0}}, r"the bits of 1\.ff are 8\.0"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ToolchainError, match=message):
        plan("2", **changes)


def test_the_strength_of_a_removed_component_is_refused() -> None:
    good = plan("2.ff").strength
    with pytest.raises(ToolchainError, match=r"strengths of 2\.ff: no such part"):
        plan("2.ff", strength=good | {"2.ff": 1.0})


def test_the_most_specific_strength_counts() -> None:
    some = plan("2", strength={"embedders": 0, "head": 1, "0": 0, "1": 0.5, "1.ff": 0.25, "3": 1})
    assert (some.strength_of("1.attn"), some.strength_of("1.ff")) == (0.5, 0.25)


def test_bits_are_known_by_the_numbers_of_the_student_too() -> None:
    some = plan("0", "2", bits={"1.attn": 8, "3.ff": 16})
    assert some.student_bits == {"0.attn": 8, "1.ff": 16}


# What is written and read


def test_a_plan_reads_as_it_was_written() -> None:
    some = plan("2", "1.ff", bits={"1.attn": 8, "3.ff": 16})
    assert plan_from_json(json.loads(json.dumps(to_json(some)))) == some


def test_an_analysis_reads_as_it_was_written() -> None:
    some = sensitivity({"1": 0.5, "1.ff": -0.25})
    for what in (some, replace(some, similarity=(0.9,) * 4, magnitude=(0.1,) * 4)):
        assert sensitivity_from_json(json.loads(json.dumps(to_json(what)))) == what


def test_units_are_written_as_people_write_them() -> None:
    data = to_json(plan("2", "1.ff"))
    assert data["schema_version"] == 3
    assert data["removed"] == ["2", "1.ff"]
    assert data["sizes"]["after"]["parameters"] == 320


def test_a_plan_of_another_schema_is_refused() -> None:
    with pytest.raises(ToolchainError, match="no plan of schema version 3 but of 2; make it again"):
        plan_from_json(to_json(plan("2")) | {"schema_version": 2})
    with pytest.raises(ToolchainError, match="no analysis of schema version 2 but of None"):
        sensitivity_from_json({})


@pytest.mark.parametrize(
    "change", [{"more": 1}, {"removed": 3}, {"removed": [4]}, {"geometry": {}}, {"strength": []}, {"bits": 8}]
)
def test_a_plan_that_is_none_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ToolchainError):
        plan_from_json(to_json(plan("2")) | change)


@pytest.mark.parametrize("missing", sorted(to_json(plan("2")).keys() - {"sizes", "schema_version"}))
def test_a_plan_with_a_missing_key_is_refused(missing: str) -> None:
    data = to_json(plan("2"))
    del data[missing]
    with pytest.raises(ToolchainError, match=missing):
        plan_from_json(data)


@pytest.mark.parametrize("missing", sorted(to_json(sensitivity({})).keys() - {"schema_version"}))
def test_an_analysis_with_a_missing_key_is_refused(missing: str) -> None:
    data = to_json(sensitivity({}))
    del data[missing]
    with pytest.raises(ToolchainError, match=missing):
        sensitivity_from_json(data)


def test_a_plan_edited_by_hand_may_not_keep_its_old_sizes() -> None:
    data = to_json(plan("2")) | {"removed": ["3"]}
    data["strength"] = to_json(plan("3"))["strength"]
    with pytest.raises(ToolchainError, match="delete `sizes`"):
        plan_from_json(to_json(plan("2")) | {"removed": ["2", "1.ff"]})
    assert plan_from_json({key: value for key, value in data.items() if key != "sizes"}).removed == units("3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"harms": (Harm(removed=units("9"), harm=1.0, standard_error=0.0),)}, "no block 9"),
        (
            {"harms": (Harm(removed=units("1"), harm=float("nan"), standard_error=0.0),)},
            "harm of 1 is nan",
        ),
        ({"harms": (Harm(removed=(), harm=1.0, standard_error=0.0),)}, "harm of nothing"),
        ({"similarity": (1.0,)}, "similarity is .1.0.; one number for each of 4 blocks"),
        ({"magnitude": (1.0, 1.0, 1.0, float("inf"))}, "magnitude is"),
        ({"semantics": "none"}, "unknown semantics"),
    ],
)
def test_an_analysis_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ToolchainError, match=message):
        replace(sensitivity({}), **changes)


# Update strengths

HARMS = {
    **dict.fromkeys(("0", "1", "2", "3"), 1.0),
    "3.attn": 16.0,
    "3.ff": 4.0,
    "3.ff_context": -1.0,
    "0.attn": 400.0,
}
"""After a removal in block 2, the median harm of what block 3 has is 1: 16, 4, 0, 1, 1."""


def strength(mode: StrengthMode, *removed: str, **options: float) -> dict[str, float]:
    return strengths(sensitivity(HARMS), units(*removed), mode, **options)


def test_all_learns_under_none() -> None:
    assert strength("none", "2") == {"embedders": 1, "0": 1, "1": 1, "3": 1, "head": 1}


def test_what_stands_before_the_first_change_is_frozen() -> None:
    assert strength("pwp", "2") == {"embedders": 0, "0": 0, "1": 0, "3": 1, "head": 1}


def test_a_block_that_loses_a_component_learns() -> None:
    assert strength("pwp", "3", "1.ff") == {"embedders": 0, "0": 0, "1": 1, "2": 1, "head": 1}


def test_what_matters_more_learns_less() -> None:
    assert strength("sgdistill", "2") == {
        "embedders": 0,
        "0": 0,
        "1": 0,
        "3.attn": 0.25,
        "3.ff": 0.5,
        "3.ff_context": 1,
        "3.norm1": 1,
        "3.norm1_context": 1,
        "head": 1,
    }


def test_power_says_how_steeply_strength_falls_and_floor_how_far() -> None:
    steep = strength("sgdistill", "2", power=1.0, floor=0.125)
    assert (steep["3.attn"], steep["3.ff"]) == (0.125, 0.25)
    assert strength("sgdistill", "2", power=0.0) == strength("pwp", "2")


def test_the_binary_form_freezes_what_would_learn_at_less_than_half() -> None:
    binary = strength("sgdistill-binary", "2")
    assert {name: binary[name] for name in ("3.attn", "3.ff", "3.ff_context", "3.norm1")} == {
        "3.attn": 0,
        "3.ff": 1,
        "3.ff_context": 1,
        "3.norm1": 1,
    }
    assert set(binary.values()) == {0.0, 1.0}


def test_nothing_is_frozen_when_graded() -> None:
    graded = strength("graded", "2")
    assert graded["3.attn"] == 0.25
    assert graded["1"] == 0.1  # of the median harm, before the first change
    assert graded["0.attn"] == pytest.approx(0.1 * 0.05)
    assert graded["embedders"] == min(graded.values()) > 0


def test_a_component_that_was_not_measured_counts_as_its_block() -> None:
    got = strengths(sensitivity({"1": 1.0, "2": 1.0, "3": 4.0}), units("0"), "sgdistill")
    assert got == {"embedders": 0, "1": 1, "2": 1, "3": 0.5, "head": 1}


def test_where_most_is_harmless_the_least_harmful_of_the_rest_is_the_measure() -> None:
    got = strengths(sensitivity({"1": 0.0, "2": 4.0, "3": 0.0}), units("0", "2.ff"), "sgdistill")
    assert got == {"embedders": 0, "1": 1, "2": 1, "3": 1, "head": 1}


def test_all_learns_where_nothing_harms() -> None:
    assert strengths(sensitivity({"2": 0.0, "3": -1.0}), units("1"), "sgdistill")["3"] == 1


def test_sensitivity_guided_strengths_need_an_analysis() -> None:
    with pytest.raises(ToolchainError, match=r"does not say what removing 3\.attn or its block does"):
        strengths(sensitivity({}), units("2"), "sgdistill")


@pytest.mark.parametrize("options", [{"power": -1.0}, {"power": float("nan")}, {"floor": 1.5}])
def test_strength_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ToolchainError, match="power is at least 0, floor from 0 to 1"):
        strength("sgdistill", "2", **options)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ToolchainError, match="unknown mode of update strengths 'some'; there are none, pwp"):
        strength("some", "2")  # type: ignore[arg-type]


def test_the_shared_prefix_is_what_is_frozen_before_the_first_change() -> None:
    assert plan("2").shared_prefix == 2
    assert plan("2", strength=strength("none", "2")).shared_prefix == 0
    assert plan("2", strength=strength("graded", "2")).shared_prefix == 0
    partly = plan("2").strength | {"1.ff": 0.5}
    assert plan("2", strength=partly).shared_prefix == 1


UNITS = [str(unit) for unit in (*map(Unit, range(4)), *geometry().units)]


@given(
    st.dictionaries(st.sampled_from(UNITS), st.floats(-1e9, 1e9), min_size=0),
    st.sampled_from(["none", "pwp", "sgdistill", "sgdistill-binary", "graded"]),
    st.sets(st.sampled_from(geometry().units), min_size=1, max_size=15),
    st.floats(0, 4),
    st.floats(0, 1),
)
def test_whatever_stays_has_a_strength_from_0_to_1(
    harms: dict[str, float], mode: StrengthMode, removed: set[Unit], power: float, floor: float
) -> None:
    what = sensitivity({"0": 1.0, "1": 2.0, "2": 3.0, "3": 4.0} | harms)
    order = tuple(sorted(removed))
    strength = strengths(what, order, mode, power=power, floor=floor)
    some = plan(removed=order, strength=strength)  # refuses any that is missing, unknown or out of range
    assert plan_from_json(json.loads(json.dumps(to_json(some)))) == some
    if mode != "none" and mode != "graded":
        assert some.shared_prefix == some.first_change
