"""Data that nobody would write by hand is refused as any other that does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from profiles.typed import TypedDataError, from_data


@dataclass(frozen=True, kw_only=True)
class Table:
    factor: float


def nested(depth: int) -> Any:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (nested(100_000), r"factor must be of type float, not \[\[\[.* \(list\)"),
        (10**400, r"factor must be of type float, and 1000.* \(int\) is too large"),
        ("x" * 1000, r"factor must be of type float, not 'x{20,60}\.\.\.x*'? \(str\)"),
    ],
    ids=["deep", "large", "long"],
)
def test_a_value_too_large_to_be_shown_is_refused(value: Any, message: str) -> None:
    with pytest.raises(TypedDataError, match=message) as refused:
        from_data(Table, {"factor": value})
    assert len(str(refused.value)) < 200
