"""Loops over a weight that numpy would make many passes over memory for, compiled when they first run.

Each keeps to numpy's order of sums and rounds where numpy does, so what is stored is the same to the bit.
Blocks are [groups, group size, N], scales [groups, N], those to try [count, groups, N].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba.core.codegen import get_host_cpu_features

__all__ = [
    "TILE",
    "choose_scales",
    "pack_pairs",
    "round_values",
    "scale_pairs",
    "scale_values",
    "scales_to_try",
    "to_half",
    "widen",
    "widen_rows",
]

Array = np.ndarray[Any, Any]

# As in NNCF; float16 has smaller ones, so that a part of it is not rounded to 0.
_LEAST_SCALE = np.finfo(np.float32).eps
_LEAST_HALF = np.float32(2.0**-24)
_LEAST_NORMAL_HALF = np.float32(2.0**-14)
_GREATEST_HALF = np.float32(65504)
_UPPER, _HALF, _WORD = np.uint32(0xFFFF0000), np.uint32(16), np.uint64(32)
_NIBBLE = np.int8(4)

TILE = 32
"""Columns that are read side by side where each lies by itself."""


# LLVM uses half of a vector of 512 bits, since processors that are gone slowed down with whole ones.
if "+avx512f" in (features := get_host_cpu_features()).split(","):  # type: ignore[no-untyped-call]
    numba.config.CPU_FEATURES = f"{features},-prefer-256-bit"  # type: ignore[attr-defined]


def _compiled(function: Callable[..., Any]) -> Any:
    """Compile a loop beside which other threads go on, and in which dividing by zero gives an infinity."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # there is no directory to keep it in
        return numba.njit(function, **options)


@_compiled
def widen(bits: Array, out: Array) -> None:
    """Make float32 [K, N] of the bits of bfloat16, which are the upper half of it."""
    rows, columns = bits.shape
    halves = out.view(np.uint32)
    # Whichever of the two lies together in memory, neither is left far behind.
    for start in range(0, columns, 16):
        for row in range(rows):
            for column in range(start, min(start + 16, columns)):
                halves[row, column] = np.uint32(bits[row, column]) << np.uint32(16)


@_compiled
def widen_rows(words: Array, out: Array) -> None:
    """Make float32 [K, N] of the bits of bfloat16 that lie four to a word [K / 4, N]."""
    rows, columns = words.shape
    tiled = columns // TILE * TILE
    halves, gathered = out.view(np.uint32), np.empty(TILE, dtype=np.uint64)
    for start in range(0, tiled, TILE):
        for row in range(rows):
            # Of a length the compiler knows, so that nothing is left of the loops but their vectors.
            for index in range(TILE):
                gathered[index] = words[row, start + index]
            for index in range(TILE):
                halves[4 * row, start + index] = np.uint32(gathered[index]) << _HALF
            for index in range(TILE):
                halves[4 * row + 1, start + index] = np.uint32(gathered[index]) & _UPPER
            for index in range(TILE):
                halves[4 * row + 2, start + index] = np.uint32(gathered[index] >> _WORD) << _HALF
            for index in range(TILE):
                halves[4 * row + 3, start + index] = np.uint32(gathered[index] >> _WORD) & _UPPER
    for row in range(rows):
        for column in range(tiled, columns):
            lower, upper = np.uint32(words[row, column]), np.uint32(words[row, column] >> _WORD)
            halves[4 * row, column], halves[4 * row + 1, column] = lower << _HALF, lower & _UPPER
            halves[4 * row + 2, column], halves[4 * row + 3, column] = upper << _HALF, upper & _UPPER


@_compiled
def scales_to_try(
    block: Array,
    importance: Array,
    factors: Array,
    mend: bool,
    low: np.float32,
    high: np.float32,
    tried: Array,
) -> None:
    """Multiply the scales at which a group's largest weight is just within `low` with some factors.

    Where it is asked for, each is followed by what least squares makes of it, for the values it rounds to.
    """
    groups, size, columns = block.shape
    unit = np.empty(columns, dtype=np.float32)
    squares, mixed = np.empty_like(unit), np.empty_like(unit)
    for group in range(groups):
        unit[:] = 0
        for row in range(size):
            for column in range(columns):
                unit[column] = max(unit[column], abs(block[group, row, column]))
        for index in range(len(factors)):
            scale = tried[2 * index if mend else index, group]
            for column in range(columns):
                scale[column] = max(unit[column] / -low, _LEAST_SCALE) * factors[index]
            to_half(scale)
            if mend:
                squares[:] = 0
                mixed[:] = 0
                for row in range(size):
                    values, weight = block[group, row], importance[group, row]
                    for column in range(columns):
                        nearest = _nearest(values[column] / scale[column], low, high)
                        squares[column] += nearest * nearest * weight
                        mixed[column] += nearest * values[column] * weight
                mended = tried[2 * index + 1, group]
                for column in range(columns):
                    best = mixed[column] / squares[column] if squares[column] > 0 else scale[column]
                    mended[column] = max(best, _LEAST_SCALE)
                to_half(mended)


@_compiled
def choose_scales(
    block: Array,
    importance: Array,
    tried: Array,
    low: np.float32,
    high: np.float32,
    chosen: Array,
    least: Array,
) -> None:
    """Choose the first of the scales of each group with the least sum of squared errors, weighed.

    Both are infinite where every sum is so or NaN. Values are multiplied by a scale's inverse, which takes
    half the time of dividing: one halfway between two integers is as far from either.
    """
    groups, size, columns = block.shape
    chosen[:] = np.inf
    least[:] = np.inf
    inverse, error = np.empty(columns, dtype=np.float32), np.empty(columns, dtype=np.float32)
    for group in range(groups):
        for index in range(len(tried)):
            scale = tried[index, group]
            error[:] = 0
            for column in range(columns):
                inverse[column] = np.float32(1) / scale[column]
            for row in range(size):
                values, weight = block[group, row], importance[group, row]
                for column in range(columns):
                    nearest = _nearest(values[column] * inverse[column], low, high)
                    difference = nearest * scale[column] - values[column]
                    error[column] += difference * difference * weight
            for column in range(columns):
                if error[column] < least[group, column]:
                    least[group, column] = error[column]
                    chosen[group, column] = scale[column]


@_compiled
def round_values(
    block: Array, scales: Array, low: np.float32, high: np.float32, mask: np.int8, out: Array
) -> None:
    """Round a block with its scales to integers [groups * group size, N]; the mask says which bits stay."""
    groups, size, columns = block.shape
    for group in range(groups):
        for row in range(size):
            for column in range(columns):
                # Not times the inverse: halves would fall to the other side than NNCF's.
                nearest = _nearest(block[group, row, column] / scales[group, column], low, high)
                out[group * size + row, column] = np.int8(nearest) & mask


@_compiled
def _nearest(quotient: np.float32, low: np.float32, high: np.float32) -> np.float32:
    return min(max(np.rint(quotient), low), high)


@_compiled
def to_half(values: Array) -> None:
    """Round positive float32 to numbers of float16, in place; numpy takes ten times as long."""
    bits = values.view(np.uint32)
    for index in range(len(values)):
        if values[index] < _LEAST_NORMAL_HALF:
            values[index] = np.rint(values[index] / _LEAST_HALF) * _LEAST_HALF
        else:
            odd = (bits[index] >> np.uint32(13)) & np.uint32(1)
            bits[index] = (bits[index] + np.uint32(0xFFF) + odd) & np.uint32(0xFFFFE000)
            if values[index] > _GREATEST_HALF:
                values[index] = np.inf


@_compiled
def pack_pairs(values: Array, out: Array) -> None:
    """Put the lower halves of two bytes into one, the first in its lower half."""
    for index in range(len(out)):
        out[index] = values[2 * index] | (values[2 * index + 1] << np.uint8(4))


@_compiled
def scale_values(values: Array, scales: Array, shift: np.int8, out: Array) -> None:
    """Multiply signed integers [K, N] with their scales; so many of a byte's upper bits are not theirs."""
    rows, columns = values.shape
    size = rows // len(scales)
    for row in range(rows):
        for column in range(columns):
            value = np.int8(values[row, column] << shift) >> shift
            out[row, column] = value * scales[row // size, column]


@_compiled
def scale_pairs(packed: Array, scales: Array, size: int, start: int, out: Array) -> None:
    """Multiply INT4 values [K, N] that lie as `pack_pairs` puts them with scales of `size` rows each.

    `out` is their rows from `start` on.
    """
    rows, columns = out.shape
    for row in range(rows):
        place, scale = (start + row) * columns, scales[(start + row) // size]
        first = place % 2  # in the upper half of a byte that the row before ends in
        if first:
            out[row, 0] = (np.int8(packed[place // 2]) >> _NIBBLE) * scale[0]
        begin, pairs = (place + 1) // 2, (columns - first) // 2
        for pair in range(pairs):
            byte, column = np.int8(packed[begin + pair]), first + 2 * pair
            out[row, column] = (np.int8(byte << _NIBBLE) >> _NIBBLE) * scale[column]
            out[row, column + 1] = (byte >> _NIBBLE) * scale[column + 1]
        if first + 2 * pairs < columns:
            byte = np.int8(packed[begin + pairs])
            out[row, columns - 1] = (np.int8(byte << _NIBBLE) >> _NIBBLE) * scale[columns - 1]
