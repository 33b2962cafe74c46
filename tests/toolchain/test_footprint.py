"""Memory is added up from the plan: what is shared counts once, and what rests counts not at all."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from toolchain.errors import ToolchainError
from toolchain.footprint import DistillMemory, Mode, memory_arithmetic
from toolchain.geometry import Block, Geometry, Part, Unit
from toolchain.plan import CompressionPlan

WIDTH = 4
HEAD = 2 * WIDTH * (WIDTH + 1)


def part(name: str, parameters: int) -> Part:
    return Part(name=name, parameters=parameters, flops=0, zero=((name,),), identity=((name,),))


BLOCK = Block(kind="joint", components=("attn", "ff"), parts=(part("attn", 1000), part("ff", 100)))
GEOMETRY = Geometry(
    family="sd3",
    blocks=(BLOCK,) * 6,
    other_parameters=HEAD + 7,
    other_flops=0,
    height=64,
    width=32,
    text_tokens=2,
)
TOKENS = 4 * 2 + 2


def plan_of(*removed: str, **strength: float) -> CompressionPlan:
    start = {"embedders": 0.0, "0": 0.0, "1": 0.0, "2": 0.0, "3": 1.0, "4": 1.0, "5": 1.0, "head": 1.0}
    return CompressionPlan(
        model="tiny",
        geometry=GEOMETRY,
        semantics="zero",
        rule="manual",
        removed=tuple(map(Unit.parse, removed)),
        strength={key: value for key, value in (start | strength).items() if key not in removed},
        asked={},
    )


def memory(mode: Mode, plan: CompressionPlan | None = None, **options: int) -> DistillMemory:
    return memory_arithmetic(plan or plan_of("3"), mode=mode, inner_width=WIDTH, **options)


def test_everything_is_added_up() -> None:
    learning = 2 * 1100 + HEAD
    stream = 2 * TOKENS * WIDTH * 2
    expected = DistillMemory(
        prefix=(3 * 1100 + 7) * 2,
        teacher_tail=(3 * 1100 + HEAD) * 2,
        student_frozen=0,
        student_tail=learning * 4,
        casts=learning * 2,
        gradients=learning * 4,
        moments=learning * 8,
        activations=2 * stream + 2 * TOKENS * WIDTH * 64,
        teacher_features=2 * stream,
    )
    assert memory("shared", batch_size=2) == expected
    assert expected.total == sum(asdict(expected).values())


def test_what_is_not_there_counts_nothing() -> None:
    shared, without = memory("shared"), memory("cached", features=False)
    assert memory("whole").prefix == 2 * shared.prefix
    assert (memory("cached").prefix, memory("cached").teacher_tail) == (0, shared.teacher_tail)
    assert (without.prefix, without.teacher_tail, without.teacher_features) == (0, 0, 0)
    assert (memory("in-turn").prefix, memory("in-turn").teacher_tail) == (0, 0)
    totals = [memory(mode).total for mode in ("whole", "shared", "cached", "in-turn")]
    assert totals == sorted(totals, reverse=True)


def test_frozen_parts_of_the_tail_have_no_gradients() -> None:
    frozen = memory("shared", plan_of("3", **{"4.attn": 0.0, "head": 0.0}))
    assert frozen.student_frozen == (1000 + HEAD) * 2
    assert frozen.gradients == (100 + 1100) * 4


def test_a_removed_component_counts_no_more() -> None:
    assert memory("shared", plan_of("3.ff")).gradients == (3 * 1100 - 100 + HEAD) * 4


def test_without_a_prefix_both_have_their_own_embedders() -> None:
    everything = memory("shared", plan_of("3", **dict.fromkeys(["embedders", *"012"], 1.0)))
    assert everything.prefix == 0
    assert everything.gradients == (5 * 1100 + HEAD + 7) * 4
    assert everything.teacher_tail == (6 * 1100 + HEAD + 7) * 2


def test_moments_of_8_bits_take_a_quarter() -> None:
    assert memory("shared", moment_bytes=2).moments * 4 == memory("shared").moments


def test_recomputing_keeps_one_block_instead_of_all() -> None:
    block = TOKENS * WIDTH * 64
    assert memory("shared", checkpointing=False).activations == 2 * block
    assert memory("shared").activations == 2 * TOKENS * WIDTH * 2 + block


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ToolchainError, match="there are whole, shared, cached, in-turn"):
        memory("all")  # type: ignore[arg-type]
