"""A transformer as numbers: what is left of it, and how it is written down."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from toolchain.errors import ToolchainError
from toolchain.geometry import Block, Geometry, Part, Size, Unit, geometry_from_json, kept_parts


def part(name: str, parameters: int, *zero: tuple[str, ...], only_for_next: bool = False) -> Part:
    return Part(
        name=name,
        parameters=parameters,
        flops=10 * parameters,
        zero=zero,
        identity=(),
        only_for_next=only_for_next,
    )


BLOCK = Block(
    kind="joint",
    components=("attn", "ff", "norm"),
    parts=(
        part("attn", 8, ("attn",)),
        part("ff", 4, ("ff",)),
        part("norm", 2, ("attn", "ff"), ("norm",)),
        part("text", 1, only_for_next=True),
    ),
)
GEOMETRY = Geometry(
    family="sd3", blocks=(BLOCK,) * 3, other_parameters=100, other_flops=0, height=64, width=32, text_tokens=5
)


@pytest.mark.parametrize("text", ["0", "25", "13.ff", "7.norm1_context"])
def test_a_unit_reads_as_it_is_written(text: str) -> None:
    assert str(Unit.parse(text)) == text


@pytest.mark.parametrize("text", ["", "-1", "01", "ff", "1.", "1.FF", "1.a.b", " 1"])
def test_what_is_no_unit_is_refused(text: str) -> None:
    with pytest.raises(ToolchainError, match="neither a block"):
        Unit.parse(text)


@pytest.mark.parametrize(
    ("removed", "parameters"),
    [
        ("", 100 + 15 + 15 + 14),
        ("0.attn", 100 + 7 + 15 + 14),
        ("0.attn 0.ff", 100 + 1 + 15 + 14),
        ("0.attn 0.ff 0.norm", 100 + 15 + 14),
        ("0", 100 + 15 + 14),
        ("0 0.ff", 100 + 15 + 14),
        ("2", 100 + 15 + 14),
        ("1 2", 100 + 14),
        ("0 1 2", 100),
    ],
)
def test_what_is_left_is_what_nothing_took_along(removed: str, parameters: int) -> None:
    """The last block that is kept makes no text for a next one."""
    units = [Unit.parse(text) for text in removed.split()]
    left = GEOMETRY.remaining(units, "zero")
    assert left == Size(parameters=parameters, flops=10 * (parameters - 100))


def test_each_semantics_has_its_own_rule() -> None:
    assert len(kept_parts(BLOCK, {"attn"}, "zero")) == 3
    assert kept_parts(BLOCK, {"attn"}, "identity") == BLOCK.parts
    assert kept_parts(BLOCK, {"attn", "ff", "norm"}, "identity") == ()


def test_units_are_all_components_in_order() -> None:
    assert [str(unit) for unit in GEOMETRY.units][:4] == ["0.attn", "0.ff", "0.norm", "1.attn"]


@pytest.mark.parametrize(
    ("unit", "message"), [("3", "the model has the blocks 0 to 2"), ("1.mlp", "it has attn, ff, norm")]
)
def test_a_unit_that_is_not_there_is_refused(unit: str, message: str) -> None:
    with pytest.raises(ToolchainError, match=message):
        GEOMETRY.remaining([Unit.parse(unit)], "zero")


def test_a_geometry_reads_as_it_was_written() -> None:
    data = json.loads(json.dumps(asdict(GEOMETRY)))
    assert geometry_from_json(data) == GEOMETRY
    with pytest.raises(ToolchainError, match="a geometry has the keys"):
        geometry_from_json({**data, "extra": 1})
