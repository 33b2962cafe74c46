"""The arithmetic of storing one matrix in 4 or 8 bits: the scale of each group, and what is rounded to what.

Symmetric and blocked: `group_size` weights along the input axis share one float16 scale. NNCF's symmetric
scale carries a sign, to reach -8 from either side, and TensorRT documents scales as strictly positive: its
builder lets others pass, but nothing then says what the device makes of them. So each group tries several
positive scales around NNCF's magnitude and keeps the one with the least squared error. Rounding itself is
NNCF's `do_integer_quantization`, bit for bit.

A matrix is worked through in blocks that stay in a core's cache, on all cores (`export/kernels.py`): passes
over memory would cost several times the arithmetic.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import ml_dtypes
import numpy as np

from export import kernels
from export.errors import ExportError

__all__ = [
    "IntBits",
    "RoundedMatrix",
    "dequantize",
    "dequantize_packed",
    "num_threads",
    "pack",
    "quantize_matrix",
]

Array = np.ndarray[Any, Any]
IntBits = Literal[4, 8]

# Of the scale at which the largest weight of a group is just within -8 (-128). For 4 bits 8/7 brings it
# within 7 as well, 16/15 is halfway, and less than 1 clips it to the benefit of all others. With 8 bits a
# step is so small that clipping never pays.
_FACTORS: dict[int, tuple[float, ...]] = {
    4: (0.85, 0.92, 1.0, 16 / 15, 8 / 7),
    8: (1.0, 256 / 255, 128 / 127),
}
# Where the inputs are known the largest weight may be one that hardly matters, and clipping it further pays.
# Each of these scales is tried as it is and as least squares mends it for the values it rounds to.
_AWARE_FACTORS: dict[int, tuple[float, ...]] = {4: (0.6, 0.75, 0.9, 1.0, 8 / 7), 8: _FACTORS[8]}

# Weights in a block: as float32 half a megabyte, which stays in a core's cache.
_BLOCK = 1 << 17
# Columns in a stripe, at most: where a row of the matrix lies scattered in memory, as with the transpose that
# torch keeps, so many runs of weights are read side by side.
_COLUMNS = 256

# Below this share of the mean importance an input counts as if it had this share: a group of inputs that were
# never seen would else have no error to choose by.
_LEAST_IMPORTANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class RoundedMatrix:
    """A weight [K, N] in few bits."""

    values: Array
    """INT4 (one to a byte) or INT8 [K, N]."""
    scales: Array
    """float16 [K / group_size, N], above zero; infinite where a group has none, because it holds NaN or
    weights too large for any."""
    error: float
    """Sum of the squared errors, each times the importance of its input where that was given."""


def quantize_matrix(
    weight: Array,
    *,
    bits: IntBits,
    group_size: int,
    importance: Array | None = None,
    threads: int | None = None,
) -> RoundedMatrix:
    """Round a weight [K, N] to signed integers with a positive float16 scale for each group along K.

    The values are rounded with the scales as stored, so float32 and float16 graphs hold the same weights.
    Beside the result, a megabyte of memory for each thread is all it takes.

    Args:
        weight: Of any floating type and memory order: blocks are converted one at a time.
        bits: Of the values.
        group_size: Weights along K that share a scale; a divisor of K.
        importance: [K] The mean square of each input, which weighs the errors when a scale is chosen.
        threads: At once; as many as there are cores by default. The result does not depend on it.

    Raises:
        ExportError: The group size does not divide K, or the importance does not fit the weight.
    """
    rows, columns = weight.shape
    if rows % group_size:
        raise ExportError(f"{rows} inputs cannot be divided into groups of {group_size}")
    values = np.empty((rows, columns), dtype=np.int8)
    scales = np.empty((rows // group_size, columns), dtype=np.float16)
    importances, unit = (None, 1.0) if importance is None else _checked(importance, rows)

    def work(stripe: slice) -> float:
        # What is too large for any scale shows in the result.
        with np.errstate(over="ignore", invalid="ignore"):
            return _quantize_stripe(weight, stripe, bits, group_size, importances, values, scales)

    with ThreadPoolExecutor(threads or num_threads()) as pool:
        error = math.fsum(pool.map(work, _stripes(columns)))
    typed = values.view(ml_dtypes.int4) if bits == 4 else values
    return RoundedMatrix(values=typed, scales=scales, error=error * unit)


def dequantize(values: Array, scales: Array) -> Array:
    """What a device computes with, as float32 [K, N]."""
    unused = np.int8(0 if values.dtype == np.int8 else 4)
    whole, steps = values.view(np.int8), scales.astype(np.float32)
    restored = np.empty(values.shape, dtype=np.float32)

    def work(stripe: slice) -> None:
        kernels.scale_values(whole[:, stripe], steps[:, stripe], unused, restored[:, stripe])

    with ThreadPoolExecutor(num_threads()) as pool:
        list(pool.map(work, _stripes(values.shape[1])))
    return restored


def dequantize_packed(packed: Array, scales: Array, rows: int) -> Array:
    """The same of so many rows of INT4 values as `pack` gives them."""
    restored = np.empty((rows, scales.shape[1]), dtype=np.float32)
    size, steps = rows // len(scales), scales.astype(np.float32)

    def work(start: int) -> None:
        kernels.scale_pairs(packed, steps, size, start, restored[start : start + size])

    with ThreadPoolExecutor(num_threads()) as pool:
        list(pool.map(work, range(0, rows, size)))
    return restored


def pack(values: Array) -> Array:
    """INT4 values two to a byte, as ONNX stores them: the first in the lower half, an odd last one alone."""
    flat = values.reshape(-1).view(np.uint8)
    packed = np.empty(-(-len(flat) // 2), dtype=np.uint8)
    kernels.pack_pairs(flat, packed[: len(flat) // 2])
    if len(flat) % 2:
        packed[-1] = flat[-1]
    return packed


def _quantize_stripe(
    weight: Array,
    stripe: slice,
    bits: IntBits,
    group_size: int,
    importance: Array | None,
    values: Array,
    scales: Array,
) -> float:
    """Do some columns, all their groups, and return the error."""
    columns = stripe.stop - stripe.start
    together = max(1, _BLOCK // (group_size * columns))
    loaded = np.empty((together, group_size, columns), dtype=np.float32)
    mask = np.int8(0x0F if bits == 4 else -1)  # ml_dtypes keeps an int4 in the lower half of a byte
    factors = np.array((_FACTORS if importance is None else _AWARE_FACTORS)[bits], dtype=np.float32)
    mend = importance is not None
    if importance is None:
        importance = np.ones(len(weight), dtype=np.float32)
    tried = np.empty((len(factors) * (1 + mend), together, columns), dtype=np.float32)
    least = np.empty((together, columns), dtype=np.float32)
    total = 0.0
    for start in range(0, len(scales), together):
        groups = slice(start, min(start + together, len(scales)))
        rows = slice(groups.start * group_size, groups.stop * group_size)
        count = groups.stop - groups.start
        block, weighed = loaded[:count], importance[rows].reshape(-1, group_size)
        _load(weight[rows, stripe], block.reshape(-1, columns))
        scale = np.empty((count, columns), dtype=np.float32)
        kernels.scales_to_try(block, weighed, factors, mend, *_range(bits), tried)
        kernels.choose_scales(block, weighed, tried, *_range(bits), scale, least)
        kernels.round_values(block, scale, *_range(bits), mask, values[rows, stripe])
        scales[groups, stripe] = scale
        total += float(least[:count].sum(dtype=np.float64))
    return total


def _range(bits: IntBits) -> tuple[np.float32, np.float32]:
    return np.float32(-(2 ** (bits - 1))), np.float32(2 ** (bits - 1) - 1)


def _load(part: Array, out: Array) -> None:
    if part.dtype == ml_dtypes.bfloat16:  # numpy would convert it value by value
        if part.strides[0] == part.itemsize and len(part) % 4 == 0:
            kernels.widen_rows(part.T.view(np.uint64).T, out)
        else:
            kernels.widen(part.view(np.uint16), out)
    else:
        np.copyto(out, part)


def num_threads() -> int:
    """Of this process at once, without one waiting for another's core."""
    return len(os.sched_getaffinity(0))


def _stripes(columns: int) -> Iterator[slice]:
    """About equal parts of the columns, of whole tiles but for the last."""
    count = -(-columns // _COLUMNS)
    edges = [columns * index // count // kernels.TILE * kernels.TILE for index in range(count)]
    edges.append(columns)
    return (slice(start, stop) for start, stop in pairwise(edges))


def _checked(importance: Array, rows: int) -> tuple[Array, float]:
    """An importance as a column of float32 about 1, and what 1 stands for."""
    values = np.asarray(importance, dtype=np.float64)
    if values.shape != (rows,) or not np.isfinite(values).all() or (values < 0).any() or not values.any():
        raise ExportError(
            f"the importance of {rows} inputs has the shape {list(values.shape)}, from {values.min():g} to "
            f"{values.max():g}; it is one finite number of at least 0 for each, not all of them 0"
        )
    unit = float(values.mean())
    return np.maximum(values / unit, _LEAST_IMPORTANCE).astype(np.float32), unit
