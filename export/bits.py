"""Which weight gets how many bits, when the bytes are given: a decision, taken from harms that were measured.

Pure; `harm.py` measures. Harms are taken to add up, as small independent errors do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from export.errors import ExportError

__all__ = ["BITS", "Weight", "assign_bits", "num_bytes"]

BITS = (4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class Weight:
    """What a linear's weight costs in each width, and what its rounding does to the model."""

    name: str
    unit: str
    """Weights of a unit share their bits: a component (`7.ff`), or the weight's own name."""
    bytes4: int
    """With its scales, as `bytes8`."""
    bytes8: int
    bytes16: int
    error4: float
    """The harm of rounding it to 4 bits, in any unit that all weights share; 16 bits do none."""
    error8: float


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """A unit in some width."""

    bits: int
    size: int
    error: float


def assign_bits(weights: Sequence[Weight], *, max_bytes: int) -> dict[str, int]:
    """Give every unit 4, 8 or 16 bits so that the harm is least and the weights fit.

    All begin with 4 bits, and what lowers the harm most for each byte is widened first, until nothing that
    helps fits any more. Where 8 bits save less a byte than the step from there to 16 does, they are passed
    over. The harm left is above the least possible one by at most what the first step that does not fit
    would have saved.

    Args:
        weights: All linears whose bits may be chosen.
        max_bytes: What they may take together.

    Raises:
        ExportError: They do not fit in 4 bits.
    """
    choices = _choices(weights)
    assigned = dict.fromkeys(choices, 4)
    left = max_bytes - sum(widths[0].size for widths in choices.values())
    if left < 0:
        raise ExportError(
            f"the weights take {max_bytes - left} bytes in 4 bits, and {max_bytes} are allowed; allow more, "
            "or remove more of the model"
        )
    steps = [
        ((narrow.error - wide.error) / (wide.size - narrow.size), unit, narrow, wide)
        for unit, widths in choices.items()
        for narrow, wide in pairwise(_worthwhile(widths))
    ]
    for _, unit, narrow, wide in sorted(steps, key=lambda step: -step[0]):
        # Steps of a unit come in order, for each is worth less a byte than the one before.
        if assigned[unit] == narrow.bits and wide.size - narrow.size <= left:
            left -= wide.size - narrow.size
            assigned[unit] = wide.bits
    return assigned


def num_bytes(weights: Iterable[Weight], bits: Mapping[str, int]) -> int:
    """What weights take together when their units have some bits."""
    return sum(getattr(weight, f"bytes{bits[weight.unit]}") for weight in weights)


def _choices(weights: Sequence[Weight]) -> dict[str, list[_Choice]]:
    units: dict[str, list[Weight]] = {}
    for weight in weights:
        units.setdefault(weight.unit, []).append(weight)
    return {
        unit: [
            _Choice(bits=4, size=sum(item.bytes4 for item in of), error=sum(item.error4 for item in of)),
            _Choice(bits=8, size=sum(item.bytes8 for item in of), error=sum(item.error8 for item in of)),
            _Choice(bits=16, size=sum(item.bytes16 for item in of), error=0.0),
        ]
        for unit, of in units.items()
    }


def _worthwhile(widths: Sequence[_Choice]) -> list[_Choice]:
    """The lower convex hull: each step saves harm, and less of it a byte than the step before."""
    kept: list[_Choice] = []
    for wide in widths:
        if kept and wide.error >= kept[-1].error:
            continue
        while len(kept) > 1 and _gain(kept[-2], kept[-1]) <= _gain(kept[-1], wide):
            kept.pop()
        kept.append(wide)
    return kept


def _gain(narrow: _Choice, wide: _Choice) -> float:
    return (narrow.error - wide.error) / (wide.size - narrow.size)
