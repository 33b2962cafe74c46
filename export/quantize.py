"""Weights in fewer bits: which of them, in which groups, and a report that leaves no tensor out.

NNCF quantises one matrix at a time through its functional API, so no model has to fit in memory and the
rounding is the one its whole-model compression uses. Only the scale differs: NNCF's symmetric scale carries a
sign, to reach -8 from either side, and TensorRT documents scales as strictly positive: its builder lets
others pass, but nothing then says what the device makes of them. So each group tries a few positive scales
around NNCF's magnitude and keeps the one with the smallest squared error.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
from nncf.parameters import CompressWeightsMode
from nncf.quantization.algorithms.weight_compression.config import WeightCompressionConfig
from nncf.quantization.algorithms.weight_compression.weight_lowering import (
    calculate_integer_quantization_params,
    do_integer_quantization,
)
from nncf.tensor import Tensor

from export.lower import check_finite
from export.passes import Int4Weight, linear_weights, parameters
from export.weights import WeightFile

__all__ = [
    "QuantReport",
    "QuantizedTensor",
    "SkippedTensor",
    "StoredWeights",
    "choose_group_size",
    "quantize_matrix",
    "store_weights",
]

Bits = Literal[4, 16, 32]

# Below this a group's 16-bit scale would be a quarter of its weights' size and more.
_SMALLEST_GROUP = 16

# Around the scale at which the largest weight of a group is just within -8: 8/7 brings it within 7 as well,
# and less than 1 clips it to the benefit of all others.
_SCALE_FACTORS = (0.85, 0.92, 1.0, 16 / 15, 8 / 7)

# What turns pictures, times and prompts into tokens and back is a few thousandths of the weights and the part
# that all pictures pass through; only the blocks' linears are worth their error.
_BLOCK_LINEAR = re.compile(r"transformer_blocks\.\d+\..+\.weight")


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """A weight stored in 4 bits."""

    name: str
    group_size: int
    bytes: int
    """Of values and scales together."""


@dataclass(frozen=True, kw_only=True)
class SkippedTensor:
    """A parameter stored in 16 or 32 bits."""

    name: str
    bytes: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class QuantReport:
    """What became of each parameter."""

    quantized: tuple[QuantizedTensor, ...]
    skipped: tuple[SkippedTensor, ...]


@dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """A graph's parameters as they lie in the weight file, by the names of the torch parameters."""

    int4: Mapping[str, Int4Weight]
    plain: Mapping[str, ir.TensorProtocol]
    report: QuantReport


def store_weights(model: ir.Model, file: WeightFile, *, bits: Bits, group_size: int = 64) -> StoredWeights:
    """Write a graph's parameters; floats that are not quantised take 16 bits, with `bits` 32 they take 32.

    Args:
        model: A float32 graph; it is read, not changed.
        file: Where the parameters go.
        bits: Of the weights of the blocks' linears.
        group_size: Most weights along the input axis that share a scale.

    Raises:
        ExportError: A weight is not finite, or not within the range of float16.
    """
    logging.getLogger("nncf").setLevel(logging.WARNING)  # it announces libraries that are not used here
    linears = {value.name for value in linear_weights(model)}
    int4: dict[str, Int4Weight] = {}
    plain: dict[str, ir.TensorProtocol] = {}
    quantized, skipped = [], []
    for name, value in parameters(model).items():
        assert value.const_value is not None
        array = value.const_value.numpy()
        reason = _reason_to_skip(name, array, bits, group_size, is_linear=name in linears)
        if reason is None:
            group = choose_group_size(array.shape[0], group_size)
            values, scales = quantize_matrix(array, group)
            check_finite(f"{name}.scale", scales)
            int4[name] = Int4Weight(
                values=file.store(name, ir.Tensor(values, name=name)),
                scales=file.store(f"{name}.scale", ir.Tensor(scales, name=f"{name}.scale")),
                group_size=group,
            )
            size = values.size // 2 + scales.nbytes
            quantized.append(QuantizedTensor(name=name, group_size=group, bytes=size))
        else:
            if bits != 32 and array.dtype == np.float32:
                with np.errstate(over="ignore"):
                    array = array.astype(np.float16)
                check_finite(name, array)
            plain[name] = file.store(name, ir.Tensor(array, name=name))
            skipped.append(SkippedTensor(name=name, bytes=array.nbytes, reason=reason))
    report = QuantReport(quantized=tuple(quantized), skipped=tuple(skipped))
    return StoredWeights(int4=int4, plain=plain, report=report)


def choose_group_size(size: int, limit: int) -> int:
    """Return the largest divisor of `size` that is not above `limit`."""
    return next(group for group in range(min(size, limit), 0, -1) if size % group == 0)


def quantize_matrix(
    weight: np.ndarray[Any, Any], group_size: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Quantise a weight [K, N] to signed 4-bit values with a positive float16 scale per group along K.

    Returns:
        INT4 values [K, N] and scales [K / group_size, N]; the values are rounded with the scales as stored,
        so float32 and float16 graphs hold the same weights.
    """
    rows, columns = weight.shape
    grouped = np.ascontiguousarray(weight, dtype=np.float32).reshape(-1, group_size, columns)
    config = WeightCompressionConfig(mode=CompressWeightsMode.INT4_SYM, group_size=group_size)
    signed, _ = calculate_integer_quantization_params(Tensor(grouped), 1, config)
    magnitude = np.abs(signed.data)  # [K / group_size, 1, N]
    best_error = np.full(magnitude.shape, np.inf, dtype=np.float32)
    best_scale = np.zeros_like(magnitude)
    best_values = np.zeros(grouped.shape, dtype=np.int8)
    for factor in _SCALE_FACTORS:
        scale = (magnitude * factor).astype(np.float16).astype(np.float32)
        values = do_integer_quantization(Tensor(grouped), config, precomputed_scale=Tensor(scale)).tensor.data
        error = np.square(values * scale - grouped).sum(axis=1, keepdims=True)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, scale, best_scale)
        best_values = np.where(better, values, best_values)
    return (
        best_values.reshape(rows, columns).astype(ml_dtypes.int4),
        best_scale.reshape(-1, columns).astype(np.float16),
    )


def _reason_to_skip(
    name: str, array: np.ndarray[Any, Any], bits: Bits, group_size: int, *, is_linear: bool
) -> str | None:
    if array.ndim != 2 or not is_linear:
        return "not the weight of a linear"
    if not _BLOCK_LINEAR.fullmatch(name):
        return "outside the transformer blocks"
    if bits != 4:
        return f"{bits} bits were asked for"
    if (group := choose_group_size(array.shape[0], group_size)) < _SMALLEST_GROUP:
        return (
            f"its {array.shape[0]} inputs divide into groups of {group}, where {_SMALLEST_GROUP} is the least"
        )
    return None
