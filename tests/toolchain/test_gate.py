"""A gate says what a student has to be worth."""

from __future__ import annotations

import pytest

from toolchain.errors import ToolchainError
from toolchain.gate import Gate, parse_gate


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("shapes>=0.95", Gate(metric="shapes", bound=0.95)),
        ("velocity <= 2e-2", Gate(metric="velocity", bound=0.02)),
        ("clip:directory=models/clip>=26", Gate(metric="clip:directory=models/clip", bound=26.0)),
    ],
)
def test_a_gate_is_read_as_it_is_written(text: str, gate: Gate) -> None:
    assert parse_gate(text) == gate
    assert parse_gate(str(gate)) == gate


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shapes", "is no METRIC>=NUMBER"),
        ("shapes>0.9", "is no METRIC>=NUMBER"),
        ("shapes>=much", "is no METRIC>=NUMBER"),
        ("shapes>=nan", "is no METRIC>=NUMBER"),
        (">=0.9", "is no METRIC>=NUMBER"),
        ("shapes<=0.9", "better the larger it is, so a gate of it is shapes>=0.9"),
        ("velocity>=0.02", "better the smaller it is, so a gate of it is velocity<=0.02"),
    ],
)
def test_what_is_no_gate_is_refused(text: str, message: str) -> None:
    with pytest.raises(ToolchainError, match=message):
        parse_gate(text)


def test_the_bound_itself_passes_and_nonsense_never_does() -> None:
    score, error = Gate(metric="shapes", bound=0.9), Gate(metric="velocity", bound=0.1)
    assert [score.passes(value) for value in (0.89, 0.9, 1.0, float("nan"))] == [False, True, True, False]
    assert [error.passes(value) for value in (0.11, 0.1, 0.0, float("nan"))] == [False, True, True, False]
