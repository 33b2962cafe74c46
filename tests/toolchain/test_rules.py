"""What goes, in which order, and when it is enough."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from toolchain.errors import ToolchainError
from toolchain.geometry import Block, Geometry, Part, Unit
from toolchain.plan import (
    Harm,
    RuleName,
    Sensitivity,
    plan_from_json,
    to_json,
    unmeasured,
)
from toolchain.rules import (
    RULES,
    Budget,
    Options,
    build_plan,
    check_budget,
    format_units,
    parse_units,
)

# Parameters and FLOPs; a block has 100 and 1000.
SIZES = {
    "attn": (40, 600),
    "ff": (30, 300),
    "ff_context": (20, 90),
    "norm1": (6, 6),
    "norm1_context": (4, 4),
}


def geometry(num_blocks: int = 8, scales: list[int] | None = None) -> Geometry:
    """Blocks of 100 parameters, or so many times as many, and nothing outside them."""
    return Geometry(
        family="toy",
        blocks=tuple(
            Block(
                kind="joint",
                components=tuple(SIZES),
                parts=tuple(
                    Part(
                        name=name,
                        parameters=parameters * scale,
                        flops=flops * scale,
                        zero=((name,),),
                        identity=((name,),),
                    )
                    for name, (parameters, flops) in SIZES.items()
                ),
            )
            for scale in scales or [1] * num_blocks
        ),
        other_parameters=0,
        other_flops=0,
        height=64,
        width=64,
        text_tokens=7,
    )


def sensitivity(
    harms: list[float], components: Mapping[str, float] | None = None, **changes: Any
) -> Sensitivity:
    """Harms of the blocks; every component harms half as much as its block unless it is said."""
    by_unit = {
        **{Unit(block): harm for block, harm in enumerate(harms)},
        **{Unit(block, name): harm / 2 for block, harm in enumerate(harms) for name in SIZES},
        **{Unit.parse(name): harm for name, harm in (components or {}).items()},
    }
    return replace(
        unmeasured("m", geometry(len(harms)), "zero"),
        metric="velocity",
        harms=tuple(Harm(removed=(unit,), harm=harm, standard_error=0.0) for unit, harm in by_unit.items()),
        **changes,
    )


def removed(what: Sensitivity, rule: RuleName, budget: Budget | None = None, **options: Any) -> list[str]:
    plan = build_plan(what, budget, rule=rule, options=Options(**options))
    return list(map(str, plan.removed))


# Budgets


@pytest.mark.parametrize("given", [{}, {"bits": 4}, {"ratio": 0.2, "max_bytes": 9}])
def test_a_budget_is_exactly_one_of_three(given: dict[str, Any]) -> None:
    with pytest.raises(ToolchainError, match="a budget is one of ratio, max_bytes and max_flops, not "):
        Budget(**given)


@pytest.mark.parametrize("ratio", [-0.1, 0.0, 1.0, 1.5, float("nan")])
def test_a_share_outside_0_and_1_is_refused(ratio: float) -> None:
    with pytest.raises(ToolchainError, match=r"ratio .* is out of range"):
        Budget(ratio=ratio)
    with pytest.raises(ToolchainError, match=r"max_flops .* is out of range"):
        Budget(max_flops=ratio)


@pytest.mark.parametrize(
    "given", [{"max_bytes": 0}, {"max_bytes": 9, "bits": 0}, {"max_bytes": 9, "bits": 64}]
)
def test_a_size_that_is_none_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ToolchainError, match=r"max_bytes is 0|bits is"):
        Budget(**given)


@pytest.mark.parametrize(
    ("budget", "number"),
    [
        (Budget(ratio=0.1), 1),  # 80 of 800 parameters
        (Budget(ratio=0.125), 1),
        (Budget(ratio=0.126), 2),
        (Budget(max_bytes=1400), 1),  # at 2 bytes each: 700
        (Budget(max_bytes=1399), 2),
        (Budget(max_bytes=350, bits=4), 1),
        (Budget(max_bytes=349, bits=4), 2),
        (Budget(max_flops=0.875), 1),
        (Budget(max_flops=0.87), 2),
    ],
)
def test_it_is_enough_as_soon_as_the_budget_is_met(budget: Budget, number: int) -> None:
    assert len(removed(sensitivity([1.0] * 8), "hpp", budget, threshold=1.0)) == number


def test_a_budget_that_is_met_already_is_said_to_be() -> None:
    with pytest.raises(
        ToolchainError, match=r"nothing needs to go: .* takes 400 bytes at 4 bits, within the 400"
    ):
        build_plan(sensitivity([1.0] * 8), Budget(max_bytes=400, bits=4))


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(ratio=0.6), r"ratio 0\.6 is out of range: 0\.600 of .* parameters .* at most 0\.500 can"),
        (Budget(max_bytes=700), r"max_bytes 700 at bits 16 is .* 0\.562 .* at most 0\.500 .*800 bytes at 16"),
        (Budget(max_flops=0.3), r"max_flops 0\.3 is out of range: 0\.700 of the transformer's FLOPs"),
    ],
)
def test_a_refusal_says_what_can_be_had(budget: Budget, message: str) -> None:
    for refuse in (
        lambda: check_budget(geometry(), "zero", budget, rule="hpp", options=Options(threshold=1.0)),
        lambda: removed(sensitivity([1.0] * 8), "hpp", budget, threshold=1.0),
    ):
        with pytest.raises(ToolchainError, match=message):
            refuse()


def test_not_all_that_may_go_can_go() -> None:
    """Blocks 2 to 6 of 8 may go; one of them stays."""
    assert len(removed(sensitivity([1.0] * 8), "hpp", Budget(ratio=0.5), threshold=1.0)) == 4
    with pytest.raises(ToolchainError, match=r"at most 0\.500"):
        removed(sensitivity([1.0] * 8), "hpp", Budget(ratio=0.51), threshold=1.0)
    # Of components all but one: the smallest, of 4 parameters of 800, stays.
    with pytest.raises(ToolchainError, match=r"at most 0\.620"):
        check_budget(geometry(), "zero", Budget(ratio=0.625), rule="hpp")


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_of_three_blocks_or_fewer_none_can_go(num_blocks: int) -> None:
    with pytest.raises(ToolchainError, match=r"at most 0\.000 can"):
        build_plan(sensitivity([1.0] * num_blocks), Budget(ratio=0.1))


# Hierarchical position pruning


def test_the_least_harmful_block_goes_first() -> None:
    assert removed(sensitivity([0, 0, 9, 1, 9, 9, 9, 0]), "hpp", Budget(ratio=0.1)) == ["3"]


def test_of_equal_harms_the_later_block_goes_first() -> None:
    assert removed(sensitivity([1.0] * 8), "hpp", Budget(ratio=0.2)) == ["6", "5"]


@pytest.mark.parametrize(("harm_of_5", "first"), [(1.4, "5"), (1.5, "2")])
def test_a_later_block_may_harm_a_little_more_and_still_go_first(harm_of_5: float, first: str) -> None:
    # exp(-2/8) = 0.779 against harm_of_5 * exp(-5/8) = harm_of_5 * 0.535
    what = sensitivity([9, 9, 1.0, 9, 9, harm_of_5, 9, 9])
    assert removed(what, "hpp", Budget(ratio=0.1)) == [first]


def test_the_weight_as_transcribed_favours_removing_early_blocks() -> None:
    assert removed(sensitivity([1.0] * 8), "hpp", Budget(ratio=0.1), position_weight="paper") == ["2"]


def test_without_a_weight_harm_alone_counts() -> None:
    what = sensitivity([9, 9, 1.0, 9, 9, 1.1, 9, 9])
    assert removed(what, "hpp", Budget(ratio=0.1), position_weight="none") == ["2"]


def test_a_removal_that_improves_the_model_counts_as_harmless_and_no_better() -> None:
    what = sensitivity([9, 9, -5.0, 9, 0.0, 9, 9, 9])
    assert removed(what, "hpp", Budget(ratio=0.1)) == ["4"]


def test_how_many_blocks_are_protected_can_be_said() -> None:
    what = sensitivity([0.0] * 8)
    assert removed(what, "hpp", Budget(ratio=0.2), protect_last=3) == ["4", "3"]
    early = sensitivity([0.0, *[1.0] * 7])
    assert removed(early, "hpp", Budget(ratio=0.1), protect_first=0) == ["0"]


def test_below_the_threshold_whole_blocks_go_alone() -> None:
    what = sensitivity([9.0] * 8, {"2.ff": 0.0})
    assert removed(what, "hpp", Budget(ratio=0.24)) == ["6", "5"]


def test_from_the_threshold_on_components_follow_the_blocks() -> None:
    what = sensitivity([9.0] * 8, {"2.ff": 0.0, "1.ff": 0.0, "6.ff": 0.0, "3.ff_context": 0.1})
    # 200 of 800 is the threshold; 30 and 20 more make 0.3125. Block 1 is protected, 6 is gone.
    assert removed(what, "hpp", Budget(ratio=0.3)) == ["6", "5", "2.ff", "3.ff_context"]


def test_harm_can_be_weighed_against_what_a_removal_frees() -> None:
    what = sensitivity([9.0] * 8, {"4.norm1": 1.0, "4.attn": 2.0})
    assert removed(what, "hpp", Budget(ratio=0.255))[2:] == ["4.norm1"]
    assert removed(what, "hpp", Budget(ratio=0.255), per_parameter=True)[2:] == ["4.attn"]


def test_a_budget_of_flops_weighs_harm_against_flops() -> None:
    what = sensitivity([9.0] * 8, {"4.ff_context": 1.0, "4.ff": 2.0})
    # A parameter of ff_context costs 1/20 of harm and one of ff 2/30, a FLOP 1/90 and 2/300.
    assert removed(what, "hpp", Budget(ratio=0.26), per_parameter=True)[2:] == ["4.ff_context"]
    assert removed(what, "hpp", Budget(max_flops=0.74), per_parameter=True)[2:] == ["4.ff"]


def test_a_block_all_of_whose_components_go_is_named_as_a_whole() -> None:
    what = sensitivity([9.0] * 8, {f"3.{name}": 0.1 for name in SIZES} | {"2.ff": 0.0})
    plan = build_plan(what, Budget(ratio=0.41))
    assert plan.removed == tuple(map(Unit.parse, ["6", "5", "2.ff", "3"]))
    assert plan.kept_blocks == (0, 1, 2, 4, 7)
    assert plan.removed_components == {2: frozenset({"ff"})}


@pytest.mark.parametrize("budget", [Budget(ratio=0.15), Budget(max_bytes=1360), Budget(max_flops=0.85)])
def test_other_budgets_know_the_threshold_too(budget: Budget) -> None:
    what = sensitivity([9.0] * 8, {f"{block}.{name}": 0.0 for block in range(8) for name in SIZES})
    assert budget.needed(what.geometry) == pytest.approx(0.15)
    assert removed(what, "hpp", budget, threshold=0.16) == ["6", "5"]
    assert removed(what, "hpp", budget, threshold=0.125) == ["6", "5.attn"]


# Measured again after each removal


def test_harms_are_measured_again_after_each_removal() -> None:
    asked = []

    def rescore(gone: tuple[Unit, ...], units: Sequence[Unit]) -> Mapping[Unit, float]:
        asked.append(tuple(map(str, gone)))
        return {unit: 0.5 if unit.block == 3 else 9.0 for unit in units}

    what = sensitivity([9, 9, 9, 2.5, 1, 2, 9, 9])  # one shot would take 4 and 5
    options = {"rescore": rescore, "grain": "blocks"}
    assert removed(what, "hpp-iterative", Budget(ratio=0.25), **options) == ["4", "3"]
    assert asked == [("4",)]


def test_only_what_stands_first_is_measured_again() -> None:
    """Harm grows with what is gone, so what was worse before cannot have become the best."""
    asked: list[str] = []

    def rescore(gone: tuple[Unit, ...], units: Sequence[Unit]) -> Mapping[Unit, float]:
        asked.extend(map(str, units))
        return dict.fromkeys(units, 1.0)

    what = sensitivity([1.0] + [5.0] * 7)
    assert removed(what, "hpp-iterative", Budget(ratio=0.25), rescore=rescore, grain="blocks") == ["0", "7"]
    assert asked == ["7", "6", "5", "4", "3", "2"]


def test_components_go_by_harm_for_what_they_free() -> None:
    def rescore(gone: tuple[Unit, ...], units: Sequence[Unit]) -> Mapping[Unit, float]:
        return {unit: 2.0 * what.by_unit[unit] for unit in units}

    what = sensitivity([90.0] * 8, {"4.ff": 1.0, "4.norm1": 0.9})
    # 30 parameters for a harm of 1, 6 for 0.9; of FLOPs it is 300 and 6.
    assert removed(what, "hpp-iterative", Budget(ratio=0.04), rescore=rescore) == ["4.ff", "4.norm1"]


def test_iterating_keeps_what_is_protected() -> None:
    def rescore(gone: tuple[Unit, ...], units: Sequence[Unit]) -> Mapping[Unit, float]:
        return dict.fromkeys(units, 0.0)

    what, budget = sensitivity([0.0] * 8), Budget(ratio=0.5)
    free = removed(what, "hpp-iterative", budget, rescore=rescore, grain="blocks")
    assert free == ["7", "6", "5", "4"]
    kept = {"protect_first": 2, "protect_last": 1}
    names = removed(what, "hpp-iterative", budget, rescore=rescore, grain="blocks", **kept)
    assert names == ["6", "5", "4", "3"]


def test_iterating_needs_a_way_to_measure() -> None:
    with pytest.raises(ToolchainError, match="was given no way to: rescore"):
        removed(sensitivity([0.0] * 8), "hpp-iterative", Budget(ratio=0.2))


def test_a_unit_without_a_harm_is_named() -> None:
    what = sensitivity([1.0] * 8)
    what = replace(what, harms=tuple(item for item in what.harms if item.removed != (Unit(2),)))
    with pytest.raises(ToolchainError, match="does not say what removing 2 does; analyse the model again"):
        removed(what, "hpp-iterative", Budget(ratio=0.2), rescore=lambda *_: {}, grain="blocks")
    blocks_only = sensitivity([1.0] * 8)
    blocks_only = replace(
        blocks_only, harms=tuple(harm for harm in blocks_only.harms if harm.removed[0].component is None)
    )
    assert removed(blocks_only, "hpp", Budget(ratio=0.25)) == ["6", "5"]
    with pytest.raises(ToolchainError, match=r"removing 2\.attn does; .* with its components"):
        removed(blocks_only, "hpp", Budget(ratio=0.3))


# Baselines


def test_bk_sdm_takes_the_least_harm_wherever_it_is() -> None:
    what = sensitivity([0, 1.0, 2, -3.0, 2, 2, 1.1, 0])
    assert removed(what, "bk-sdm", Budget(ratio=0.375)) == ["3", "1", "6"]


def test_koala_takes_what_changes_its_input_least() -> None:
    what = sensitivity([1.0] * 8, similarity=(1.0, 0.5, 0.9, 0.7, 0.6, 0.95, 0.8, 1.0))
    assert removed(what, "koala", Budget(ratio=0.2)) == ["5", "2"]


def test_magnitude_takes_the_smallest_weights() -> None:
    what = sensitivity([1.0] * 8, magnitude=(0.0, 0.5, 0.2, 0.7, 0.1, 0.9, 0.3, 0.0))
    assert removed(what, "magnitude", Budget(ratio=0.2)) == ["4", "2"]


@pytest.mark.parametrize(("rule", "measure"), [("koala", "similarity"), ("magnitude", "magnitude")])
def test_a_baseline_says_what_was_not_measured(rule: RuleName, measure: str) -> None:
    with pytest.raises(
        ToolchainError, match=f"did not measure the {measure} of the blocks; analyse it again"
    ):
        removed(sensitivity([1.0] * 8), rule, Budget(ratio=0.2))


def test_random_is_a_matter_of_the_seed_and_needs_no_analysis() -> None:
    what = unmeasured("m", geometry(), "zero")
    first, again, other = (removed(what, "random", Budget(ratio=0.5), seed=seed) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("rule", ["bk-sdm", "koala", "random", "magnitude"])
def test_baselines_keep_the_first_and_the_last_block(rule: RuleName) -> None:
    what = sensitivity([0.0] * 4, similarity=(1.0,) * 4, magnitude=(1.0,) * 4)
    assert removed(what, rule, Budget(ratio=0.25))[0] in "12"
    with pytest.raises(ToolchainError, match=r"at most 0\.250 can .* first 1 and the last 1 of 4 blocks"):
        removed(what, rule, Budget(ratio=0.5))


# By hand


def test_ranges_include_both_ends() -> None:
    units = parse_units("25-28, 31,13.ff,14-16.ff_context", geometry(38))
    assert list(map(str, units)) == [
        *("25", "26", "27", "28", "31", "13.ff"),
        *("14.ff_context", "15.ff_context", "16.ff_context"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' in '' is neither a block"),
        ("3,", "'' in '3,' is neither"),
        ("3..5", r"'3\.\.5' in .* both ends included"),
        ("-1", "'-1' in '-1' is neither"),
        ("5-3", "the range '5-3' runs backwards"),
        ("3,6-8", "'6-8' in '3,6-8': there is no block 8: the model has the blocks 0 to 7"),
        ("0-99999999999", "there is no block 99999999999"),
        ("2.fff", r"'2\.fff' in .*: block 2 has no component 'fff'; it has attn, ff"),
        ("3,2-4", "'2-4' in '3,2-4': 3 is removed twice"),
        ("3.ff,3.ff", r"3\.ff is removed twice"),
        ("3,3.ff", r"'3\.ff' in '3,3\.ff': 3\.ff goes with block 3"),
        ("2-4.ff,3", r"3\.ff goes with block 3"),
    ],
)
def test_a_list_that_cannot_be_meant_is_refused(text: str, message: str) -> None:
    with pytest.raises(ToolchainError, match=message):
        parse_units(text, geometry())


@given(st.sets(st.sampled_from((*map(Unit, range(6)), *geometry(6).units))))
def test_units_read_as_they_were_written(units: set[Unit]) -> None:
    blocks = {unit.block for unit in units if unit.component is None}
    distinct = {unit for unit in units if unit.component is None or unit.block not in blocks}
    if distinct:
        assert set(parse_units(format_units(distinct), geometry(6))) == distinct


def test_what_is_written_is_short() -> None:
    units = parse_units("7,1-3,5.ff,0.ff,4-5.attn", geometry())
    assert format_units(units) == "1-3,7,0.ff,5.ff,4-5.attn"


def test_by_hand_anything_may_go_but_everything() -> None:
    what = unmeasured("m", geometry(), "zero")
    assert removed(what, "manual", units=parse_units("7,0,3.ff", what.geometry)) == ["7", "0", "3.ff"]
    with pytest.raises(ToolchainError, match="removes every block of the 8"):
        removed(what, "manual", units=parse_units("0-7", what.geometry))
    with pytest.raises(ToolchainError, match="nothing is named"):
        removed(what, "manual")


# Plans


def test_a_plan_remembers_what_was_asked() -> None:
    what = sensitivity([1.0] * 8)
    assert build_plan(what, Budget(ratio=0.2)).asked == {"strengths": "pwp", "ratio": 0.2}
    plan = build_plan(what, Budget(max_bytes=700, bits=8), options=Options(protect_first=3), mode="none")
    assert plan.asked == {"strengths": "none", "max_bytes": 700, "bits": 8, "protect_first": 3}
    manual = build_plan(what, rule="manual", options=Options(units=(Unit(3), Unit(2), Unit(4, "ff"))))
    assert manual.asked == {"strengths": "pwp", "units": "2-3,4.ff"}


def test_the_strengths_follow_the_removals() -> None:
    plan = build_plan(sensitivity([1.0] * 8), Budget(ratio=0.2))
    assert plan.strength == {"embedders": 0, **dict.fromkeys("01234", 0), "7": 1, "head": 1}


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ToolchainError, match="unknown rule 'best'; there are hpp, hpp-iterative, manual"):
        build_plan(sensitivity([1.0] * 8), Budget(ratio=0.2), rule="best")  # type: ignore[arg-type]


def test_every_rule_has_a_name_a_plan_may_bear() -> None:
    assert set(RULES) == set(get_args(RuleName))


def test_manual_alone_has_no_budget() -> None:
    with pytest.raises(ToolchainError, match="takes no budget"):
        build_plan(sensitivity([1.0] * 8), Budget(ratio=0.2), rule="manual")
    with pytest.raises(ToolchainError, match="the rule hpp needs a budget"):
        build_plan(sensitivity([1.0] * 8))


def test_an_analysis_of_other_semantics_is_refused() -> None:
    with pytest.raises(ToolchainError, match="is of zero semantics, the plan is to be of identity"):
        build_plan(sensitivity([1.0] * 8), Budget(ratio=0.2), semantics="identity")


@pytest.mark.parametrize(
    "options",
    [{"position_weight": "early"}, {"grain": "layers"}, {"protect_first": -1}, {"threshold": float("nan")}],
)
def test_options_that_are_none_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ToolchainError, match=next(iter(options))):
        Options(**options)


# Whatever the model


@st.composite
def cases(draw: st.DrawFn) -> tuple[Sensitivity, Budget, RuleName, Options]:
    scales = draw(st.lists(st.integers(1, 30), min_size=6, max_size=10))
    num = len(scales)
    harm = st.floats(-10, 10)
    names = [str(unit) for unit in geometry(num).units]
    what = sensitivity(
        draw(st.lists(harm, min_size=num, max_size=num)),
        draw(st.dictionaries(st.sampled_from(names), harm)),
        geometry=geometry(scales=scales),
        similarity=tuple(draw(st.lists(st.floats(-1, 1), min_size=num, max_size=num))),
        magnitude=tuple(draw(st.lists(st.floats(0, 1), min_size=num, max_size=num))),
    )
    size = what.geometry.size.parameters
    budget = draw(
        st.one_of(
            st.floats(0.01, 0.6).map(lambda share: Budget(ratio=share)),
            st.floats(0.4, 0.99).map(lambda share: Budget(max_flops=share)),
            st.integers(size // 4, size // 2 - 1).map(lambda most: Budget(max_bytes=most, bits=4)),
        )
    )
    options = Options(
        position_weight=draw(st.sampled_from(["late", "paper", "none"])),
        protect_first=draw(st.integers(0, 2)),
        protect_last=draw(st.integers(0, 2)),
        per_parameter=draw(st.booleans()),
        grain=draw(st.sampled_from(["blocks", "components"])),
        seed=draw(st.integers(0, 9)),
        # Harms that change with what is gone, and can be said again.
        rescore=lambda gone, units: {
            unit: abs(what.by_unit[unit]) * (1 + sum(unit.block > other.block for other in gone))
            for unit in units
        },
    )
    return what, budget, draw(st.sampled_from([rule for rule in RULES if rule != "manual"])), options


@settings(max_examples=60)
@given(cases())
def test_a_plan_meets_its_budget_with_nothing_to_spare(
    case: tuple[Sensitivity, Budget, RuleName, Options],
) -> None:
    what, budget, rule, options = case
    try:
        plan = build_plan(what, budget, rule=rule, options=options, mode="sgdistill")
    except ToolchainError as error:
        message = str(error)
    else:
        message = ""
    assume(" at most " not in message)  # this model is too small for this budget
    assert not message

    def cost(units: tuple[Unit, ...]) -> int:
        return budget.cost(what.geometry.remaining(units, "zero"))

    assert cost(plan.removed) <= budget.limit(what.geometry) < cost(plan.removed[:-1])
    num_blocks = len(what.geometry.blocks)
    protects = rule in ("hpp", "hpp-iterative")
    first, last = (options.protect_first, options.protect_last) if protects else (1, 1)
    assert all(first <= unit.block < num_blocks - last for unit in plan.removed)
    gone = plan.geometry.components_removed(plan.removed)
    for unit in plan.geometry.units:
        if unit.component not in gone.get(unit.block, ()):
            assert 0 <= plan.strength_of(str(unit)) <= 1
    assert plan_from_json(json.loads(json.dumps(to_json(plan)))) == plan
    assert build_plan(what, budget, rule=rule, options=options, mode="sgdistill") == plan
