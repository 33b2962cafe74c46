"""Loops over a weight that numpy would make many passes over memory for, compiled when they first run.

Each keeps to numpy's order of sums and rounds where numpy does, so the results are the same to the bit.
Blocks are [groups, group size, N], scales [groups, N].
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

__all__ = [
    "choose_scales",
    "largest",
    "pack_pairs",
    "products",
    "round_values",
    "scale_values",
    "widen",
]

Array = np.ndarray[Any, Any]


# Other threads go on meanwhile; dividing by zero gives an infinity.
_compiled = numba.njit(nogil=True, error_model="numpy")


@_compiled
def _nearest(value: np.float32, scale: np.float32, low: np.float32, high: np.float32) -> np.float32:
    # Not times the inverse: halves would fall to the other side than NNCF's.
    return min(max(np.rint(value / scale), low), high)


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
def largest(block: Array, out: Array) -> None:
    """Find the largest magnitude in each group."""
    out[:] = 0
    for group in range(block.shape[0]):
        for row in range(block.shape[1]):
            for column in range(block.shape[2]):
                out[group, column] = max(out[group, column], abs(block[group, row, column]))


@_compiled
def choose_scales(
    block: Array,
    scales: Array,
    importance: Array,
    low: np.float32,
    high: np.float32,
    chosen: Array,
    least: Array,
) -> None:
    """Choose the first of the scales of each group with the least sum of squared errors, weighed.

    Both are infinite where every sum is so or NaN.
    """
    chosen[:] = np.inf
    least[:] = np.inf
    error = np.empty(block.shape[2], dtype=np.float32)
    for group in range(block.shape[0]):
        for index in range(len(scales)):
            scale = scales[index, group]
            error[:] = 0
            for row in range(block.shape[1]):
                values, weight = block[group, row], importance[group, row]
                for column in range(len(values)):
                    nearest = _nearest(values[column], scale[column], low, high)
                    difference = nearest * scale[column] - values[column]
                    error[column] += difference * difference * weight
            for column in range(len(error)):
                if error[column] < least[group, column]:
                    least[group, column] = error[column]
                    chosen[group, column] = scale[column]


@_compiled
def products(
    block: Array,
    scales: Array,
    importance: Array,
    low: np.float32,
    high: np.float32,
    squares: Array,
    mixed: Array,
) -> None:
    """Sum the squares of what each scale rounds to, and its products with the weights, weighed likewise."""
    squares[:] = 0
    mixed[:] = 0
    for group in range(block.shape[0]):
        for index in range(len(scales)):
            scale = scales[index, group]
            square, mix = squares[index, group], mixed[index, group]
            for row in range(block.shape[1]):
                values, weight = block[group, row], importance[group, row]
                for column in range(len(values)):
                    nearest = _nearest(values[column], scale[column], low, high)
                    square[column] += nearest * nearest * weight
                    mix[column] += nearest * values[column] * weight


@_compiled
def round_values(
    block: Array, scale: Array, low: np.float32, high: np.float32, mask: np.int8, out: Array
) -> None:
    """Round a block with its scales to integers [groups * group size, N]; the mask says which bits stay."""
    groups, size, columns = block.shape
    for group in range(groups):
        for row in range(size):
            for column in range(columns):
                nearest = _nearest(block[group, row, column], scale[group, column], low, high)
                out[group * size + row, column] = np.int8(nearest) & mask


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
