"""What a student has to be worth: a bound on one number, as `shapes>=0.95` or `velocity<=0.02`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from toolchain.errors import ToolchainError

_TEXT = re.compile(r"(?P<metric>.+?)(?P<sign>>=|<=)(?P<bound>[^<>=]+)")


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A metric and the worst value that will do."""

    metric: str
    """`velocity`, the error of the velocity; `shapes`, the score of ShapesEval; or a metric of pictures as
    `open_metric` takes it."""
    bound: float

    @property
    def is_error(self) -> bool:
        """Whether smaller values are better."""
        return self.metric == "velocity"

    def harm(self, value: float) -> float:
        """A value as a number of which less is better."""
        return value if self.is_error else -value

    def passes(self, value: float) -> bool:
        """Whether a value will do; one that is no number never does."""
        return self.harm(value) <= self.harm(self.bound)

    def __str__(self) -> str:
        return f"{self.metric}{'<=' if self.is_error else '>='}{self.bound:g}"


def parse_gate(text: str) -> Gate:
    """Read a gate as a person writes it.

    Raises:
        ToolchainError: It is none, or asks for the wrong side of its bound.
    """
    found = _TEXT.fullmatch(text)
    try:
        bound = float(found["bound"]) if found else math.nan
    except ValueError:
        bound = math.nan
    if found is None or not math.isfinite(bound):
        raise ToolchainError(f"the gate {text!r} is no METRIC>=NUMBER: write shapes>=0.95 or velocity<=0.02")
    gate = Gate(metric=found["metric"].strip(), bound=bound)
    if gate.is_error != (found["sign"] == "<="):
        better = "smaller" if gate.is_error else "larger"
        raise ToolchainError(f"{gate.metric} is better the {better} it is, so a gate of it is {gate}")
    return gate
