"""How a matrix is rounded: as NNCF rounds, with the best of some scales, the same however it is divided."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from nncf.parameters import CompressWeightsMode
from nncf.quantization.algorithms.weight_compression.config import WeightCompressionConfig
from nncf.quantization.algorithms.weight_compression.weight_lowering import (
    calculate_integer_quantization_params,
    do_integer_quantization,
)
from nncf.tensor import Tensor

from export import kernels
from export.errors import ExportError
from export.rounding import IntBits, dequantize, dequantize_packed, pack, quantize_matrix

Array = np.ndarray[Any, Any]
MODES = {4: CompressWeightsMode.INT4_SYM, 8: CompressWeightsMode.INT8_SYM}
FACTORS = {4: (0.85, 0.92, 1.0, 16 / 15, 8 / 7), 8: (1.0, 256 / 255, 128 / 127)}


def normal(rows: int, columns: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def quantize_at_once(weight: Array, bits: IntBits, group_size: int) -> tuple[Array, Array]:
    """The same through NNCF, whole matrices at a time."""
    grouped = weight.reshape(-1, group_size, weight.shape[1])
    config = WeightCompressionConfig(mode=MODES[bits], group_size=group_size if bits == 4 else -1)
    signed, _ = calculate_integer_quantization_params(Tensor(grouped), 1, config)
    best_error = np.full(signed.shape, np.inf, dtype=np.float32)
    best_scale = np.zeros_like(signed.data)
    best_values = np.zeros(grouped.shape, dtype=np.int8)
    for factor in FACTORS[bits]:
        scale = (np.abs(signed.data) * factor).astype(np.float16).astype(np.float32)
        values = do_integer_quantization(Tensor(grouped), config, precomputed_scale=Tensor(scale)).tensor.data
        error = np.square(values * scale - grouped).sum(axis=1, keepdims=True)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, scale, best_scale)
        best_values = np.where(better, values, best_values)
    return best_values.reshape(weight.shape), best_scale[:, 0].astype(np.float16)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("rows", "columns", "group_size"),
    [(128, 96, 64), (64, 1, 64), (192, 1025, 64), (2048, 65, 16), (6, 2, 3)],
)
def test_every_value_and_scale_is_that_of_nncf_on_the_whole_matrix(
    bits: IntBits, rows: int, columns: int, group_size: int
) -> None:
    weight = normal(rows, columns) * np.random.default_rng(1).lognormal(size=(rows, 1)).astype(np.float32)
    values, scales = quantize_at_once(weight, bits, group_size)
    rounded = quantize_matrix(weight, bits=bits, group_size=group_size)
    np.testing.assert_array_equal(rounded.values.astype(np.int8), values)
    np.testing.assert_array_equal(rounded.scales, scales)


def test_the_number_of_threads_changes_nothing() -> None:
    weight, importance = normal(64, 3000), np.arange(64.0)
    one, three = (
        quantize_matrix(weight, bits=4, group_size=64, importance=importance, threads=count)
        for count in (1, 3)
    )
    np.testing.assert_array_equal(one.values, three.values)
    np.testing.assert_array_equal(one.scales, three.scales)
    assert one.error == three.error


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_a_transposed_view_of_any_type_is_rounded_like_a_float32_copy(dtype: Any) -> None:
    view = normal(100, 128).astype(dtype).T
    copy = np.ascontiguousarray(view.astype(np.float32))
    found, expected = (quantize_matrix(item, bits=4, group_size=32) for item in (view, copy))
    np.testing.assert_array_equal(found.values, expected.values)
    np.testing.assert_array_equal(found.scales, expected.scales)


@pytest.mark.parametrize(("bits", "lowest"), [(4, -8), (8, -128)])
def test_weights_on_the_grid_are_kept_exactly(bits: IntBits, lowest: int) -> None:
    weight = np.arange(lowest, -lowest, dtype=np.float32)[:, None] * 0.25
    rounded = quantize_matrix(weight, bits=bits, group_size=len(weight))
    np.testing.assert_array_equal(dequantize(rounded.values, rounded.scales), weight)
    assert rounded.error == 0


def test_weights_of_zero_stay_zero() -> None:
    rounded = quantize_matrix(np.zeros((64, 2), dtype=np.float32), bits=4, group_size=64)
    assert (rounded.scales > 0).all()
    assert not dequantize(rounded.values, rounded.scales).any()


@pytest.mark.parametrize("importance", [None, np.linspace(0.5, 3, 128)])
def test_the_error_is_that_of_the_result(importance: Array | None) -> None:
    weight = normal(128, 96)
    rounded = quantize_matrix(weight, bits=4, group_size=64, importance=importance)
    squares = np.square(dequantize(rounded.values, rounded.scales) - weight)
    if importance is not None:
        squares *= importance[:, None]
    assert rounded.error == pytest.approx(squares.sum(dtype=np.float64), rel=1e-5)


def test_an_outlier_that_no_input_reaches_does_not_spoil_the_others() -> None:
    weight = np.ones((16, 1), dtype=np.float32)
    weight[3] = 2.2
    importance = np.ones(16)
    importance[3] = 0
    plain, aware = (
        quantize_matrix(weight, bits=4, group_size=16, importance=item) for item in (None, importance)
    )
    assert dequantize(plain.values, plain.scales)[0, 0] == pytest.approx(0.94, abs=0.01)
    assert dequantize(aware.values, aware.scales)[0, 0] == pytest.approx(1.0, abs=0.001)


def test_knowing_the_inputs_lowers_the_error_that_they_see() -> None:
    weight, importance = normal(256, 32), np.random.default_rng(1).lognormal(sigma=2, size=256)
    plain, aware = (
        quantize_matrix(weight, bits=4, group_size=64, importance=item) for item in (None, importance)
    )
    seen = (np.square(dequantize(plain.values, plain.scales) - weight) * importance[:, None]).sum()
    assert aware.error < 0.9 * seen


@pytest.mark.parametrize("worst", [np.nan, np.inf, 3e6])
def test_a_group_without_a_scale_says_so_by_an_infinite_one(worst: float) -> None:
    weight = np.ones((64, 2), dtype=np.float32)
    weight[5, 1] = worst
    rounded = quantize_matrix(weight, bits=4, group_size=32)
    assert np.isfinite(rounded.scales).tolist() == [[True, False], [True, True]]


def test_scales_become_the_halves_that_numpy_makes_of_them() -> None:
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (halves[:-1] + halves[1:]) / 2
    near = [np.nextafter(middles, np.float32(way), dtype=np.float32) for way in (0, np.inf)]
    values = np.concatenate([halves, middles, *near, np.float32([65519, 65520, 1e6, np.inf])])
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).astype(np.float32)
    kernels.to_half(values)
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("size", [1, 6, 7, (1 << 18) + 1])
def test_packed_values_lie_as_onnx_stores_them(size: int) -> None:
    values = np.random.default_rng(0).integers(-8, 8, size).astype(ml_dtypes.int4)
    assert pack(values).tobytes() == ir.Tensor(values).tobytes()


@pytest.mark.parametrize(("groups", "size", "columns"), [(2, 64, 32), (2, 32, 33), (3, 19, 7), (1, 19, 1)])
def test_packed_values_stand_for_what_the_values_do(groups: int, size: int, columns: int) -> None:
    generator = np.random.default_rng(0)
    values = generator.integers(-8, 8, (groups * size, columns)).astype(ml_dtypes.int4)
    scales = generator.uniform(0.1, 1, (groups, columns)).astype(np.float16)
    found = dequantize_packed(pack(values), scales, groups * size)
    np.testing.assert_array_equal(found, dequantize(values, scales))


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ExportError, match="100 inputs cannot be divided into groups of 64"):
        quantize_matrix(normal(100, 2), bits=4, group_size=64)


@pytest.mark.parametrize("importance", [np.ones(3), np.zeros(4), -np.ones(4), np.full(4, np.nan)])
def test_an_importance_that_says_nothing_is_refused(importance: Array) -> None:
    with pytest.raises(ExportError, match="the importance of 4 inputs has the shape"):
        quantize_matrix(normal(4, 2), bits=4, group_size=4, importance=importance)
