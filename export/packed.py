"""Whether an engine holds 4-bit weights as they are stored: proof, without a GPU, that none was expanded.

TensorRT-RTX lays a weight [K, N] down as the packed bytes of its transpose, two values to a byte, the first
in the lower half; where one group of weights is as long as a column, mostly as it is in the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.weights import raw_bytes

__all__ = ["count_found", "int4_weights"]

Bytes = NDArray[np.uint8]

_COMPARED = 64
"""Bytes compared at the start of a weight, and in its middle."""
_WORD = 8
"""Bytes by which a weight is recognised."""
_STRIDE = 4
"""Weights lie at multiples of so many bytes."""
_CHUNK = 1 << 24
"""Places looked at together."""


@dataclass(frozen=True, kw_only=True)
class _Pattern:
    """What a weight must look like in the engine."""

    start: bytes
    middle: bytes
    middle_offset: int
    """Of `middle`, from the weight's first byte."""
    word_offset: int
    """Of the bytes it is recognised by, likewise."""

    @property
    def word(self) -> int:
        """The bytes it is recognised by, as one number."""
        return int.from_bytes(self.start[self.word_offset :][:_WORD], "little")

    def lies_at(self, data: Bytes, position: int) -> bool:
        """Whether the weight begins at a byte of the engine."""
        if position < 0:
            return False
        ends = (position, self.start), (position + self.middle_offset, self.middle)
        return all(data[place : place + len(part)].tobytes() == part for place, part in ends)


def int4_weights(model: ir.Model) -> list[ir.TensorProtocol]:
    """Return the initialisers of 4 bits."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return [tensor for tensor in tensors if tensor is not None and tensor.dtype == ir.DataType.INT4]


def count_found(engine: Path, weights: list[ir.TensorProtocol]) -> int:
    """Return how many of the weights lie in the engine as stored; it is read once.

    Args:
        weights: Each [K, N], of 16 values at least.
    """
    by_word: dict[int, list[tuple[int, _Pattern]]] = {}
    for index, weight in enumerate(weights):
        for transposed in (True, False):
            pattern = _pattern(weight, transposed=transposed)
            by_word.setdefault(pattern.word, []).append((index, pattern))
    data: Bytes = np.memmap(engine, np.uint8, mode="r")
    found: set[int] = set()
    for position, word in _occurrences(data, np.array(sorted(by_word), np.uint64)):
        for index, pattern in by_word[word]:
            if index not in found and pattern.lies_at(data, position - pattern.word_offset):
                found.add(index)
    return len(found)


def _occurrences(data: Bytes, words: NDArray[np.uint64]) -> list[tuple[int, int]]:
    """Return where in the data which of the sorted words stand, at multiples of the stride."""
    if not len(words):
        return []
    halves = data[: len(data) // _STRIDE * _STRIDE].view("<u4")
    # Nearly all places are ruled out by two bytes, which a table is small enough for.
    possible = np.zeros(1 << 16, np.bool_)
    possible[(words & np.uint64(0xFFFF)).astype(np.int64)] = True
    hits: list[tuple[int, int]] = []
    for begin in range(0, len(halves) - 1, _CHUNK):
        lower = halves[begin : begin + _CHUNK]
        places = begin + np.flatnonzero(possible[lower.view("<u2")[::2]])
        places = places[places < len(halves) - 1]
        read = halves[places].astype(np.uint64) | halves[places + 1].astype(np.uint64) << np.uint64(32)
        nearest = np.minimum(np.searchsorted(words, read), len(words) - 1)
        known = words[nearest] == read
        hits += zip((places[known] * _STRIDE).tolist(), read[known].tolist(), strict=True)
    return hits


def _pattern(weight: ir.TensorProtocol, *, transposed: bool) -> _Pattern:
    rows, columns = weight.shape.numpy()
    stored = raw_bytes(weight)
    middle = len(stored) // 2

    def read(first: int) -> bytes:
        last = min(first + _COMPARED, len(stored))
        return _transposed(stored, rows, columns, first, last) if transposed else stored[first:last].tobytes()

    start = read(0)
    # Where it varies most: long runs of one value stand in many places.
    offsets = range(0, len(start) - _WORD + 1, _STRIDE)
    word_offset = max(offsets, key=lambda offset: len(set(start[offset : offset + _WORD])))
    return _Pattern(
        start=start,
        middle=read(middle),
        middle_offset=middle,
        word_offset=word_offset,
    )


def _transposed(stored: Bytes, rows: int, columns: int, first: int, last: int) -> bytes:
    """Return bytes of the packed transpose [N, K], from the first to before the last."""
    index = np.arange(2 * first, 2 * last)
    place = index % rows * columns + index // rows  # in the matrix as it is stored
    values = stored[place // 2] >> (4 * (place % 2)).astype(np.uint8) & 15
    packed: Bytes = values[0::2] | values[1::2] << 4
    return packed.tobytes()
