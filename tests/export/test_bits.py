"""How bits are handed out: where they lower the harm most for their bytes, and never more than fit."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.bits import Weight, assign_bits, num_bytes
from export.errors import ExportError


def weight(unit: str, error4: float, error8: float = 0.0, size: int = 10, name: str = "w") -> Weight:
    """Of `size` bytes in 4 bits."""
    return Weight(
        name=f"{unit}.{name}",
        unit=unit,
        bytes4=size,
        bytes8=2 * size,
        bytes16=4 * size,
        error4=error4,
        error8=error8,
    )


def test_all_have_4_bits_when_no_more_fit() -> None:
    assert assign_bits([weight("0.ff", 1.0), weight("0.attn", 2.0)], max_bytes=29) == {"0.ff": 4, "0.attn": 4}


def test_what_harms_most_for_its_bytes_is_widened_first() -> None:
    weights = [weight("0.ff", 3.0, size=40), weight("0.attn", 2.0), weight("1.attn", 1.0)]
    assert assign_bits(weights, max_bytes=70) == {"0.ff": 4, "0.attn": 8, "1.attn": 4}
    assert assign_bits(weights, max_bytes=80) == {"0.ff": 4, "0.attn": 8, "1.attn": 8}


def test_what_does_not_fit_makes_room_for_what_does() -> None:
    weights = [weight("0.ff", 9.0, size=40), weight("0.attn", 1.0)]
    assert assign_bits(weights, max_bytes=60) == {"0.ff": 4, "0.attn": 8}


def test_16_bits_are_given_where_8_hardly_help() -> None:
    weights = [weight("0.ff", 8.0, error8=7.0), weight("0.attn", 1.0, error8=0.5)]
    assert assign_bits(weights, max_bytes=50) == {"0.ff": 16, "0.attn": 4}


def test_bits_that_help_nothing_are_not_given() -> None:
    assert assign_bits([weight("0.ff", 0.0), weight("0.attn", 1.0)], max_bytes=1000) == {
        "0.ff": 4,
        "0.attn": 8,
    }


def test_weights_of_a_unit_share_their_bits() -> None:
    weights = [weight("0.ff", 1.0, name="in"), weight("0.ff", 0.0, name="out"), weight("0.attn", 0.75)]
    assert assign_bits(weights, max_bytes=40) == {"0.ff": 4, "0.attn": 8}


def test_too_few_bytes_are_refused() -> None:
    with pytest.raises(ExportError, match="take 20 bytes in 4 bits, and 19 are allowed"):
        assign_bits([weight("0.ff", 1.0), weight("0.attn", 1.0)], max_bytes=19)


@given(
    st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1), st.integers(1, 9)), min_size=1, max_size=4),
    st.floats(1, 4),
)
def test_the_harm_left_is_near_the_least_possible(parts: list[tuple[float, float, int]], room: float) -> None:
    weights = [
        weight(str(index), error, share * error, size) for index, (error, share, size) in enumerate(parts)
    ]
    max_bytes = int(room * sum(item.bytes4 for item in weights))

    def harm(bits: dict[str, int]) -> float:
        return sum({4: item.error4, 8: item.error8, 16: 0.0}[bits[item.unit]] for item in weights)

    found = assign_bits(weights, max_bytes=max_bytes)
    assert num_bytes(weights, found) <= max_bytes
    units = [item.unit for item in weights]
    possible = [
        dict(zip(units, bits, strict=True)) for bits in itertools.product((4, 8, 16), repeat=len(units))
    ]
    least = min(harm(bits) for bits in possible if num_bytes(weights, bits) <= max_bytes)
    assert harm(found) <= least + max(item.error4 for item in weights) + 1e-9
