"""Graph rewrites, on graphs of a few nodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_ir.passes import PreconditionError

from export.passes import (
    BlockedWeight,
    FoldTransposedWeights,
    GemmToMatMul,
    QuantizeWeights,
    StoreWeights,
    linear_weights,
)

Array = np.ndarray[Any, Any]

GEMM = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 2] x) => (float[n, 3] y)
<float[3, 2] w = {1, 2, 3, 4, 5, 6}, float[3] b = {10, 20, 30}>
{ y = Gemm<transB=1>(x, w, b) }
"""
SHARED = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 2] x) => (float[n, 3] y, float[3, 2] z)
<float[3, 2] w = {1, 2, 3, 4, 5, 6}>
{ t = Transpose<perm=[1, 0]>(w)
  y = MatMul(x, t)
  z = Neg(w) }
"""
MATMUL = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 4] x) => (float[n, 2] y)
<float[4, 2] w = {1, -2, 3, 4, 5, 6, 7, -8}>
{ y = MatMul(x, w) }
"""


def run(model: ir.Model, x: Array) -> Array:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return np.asarray(session.run(["y"], {"x": x})[0])


def operations(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_gemm_becomes_matmul_with_inputs_by_outputs_and_add() -> None:
    model = ir.from_onnx_text(GEMM)
    GemmToMatMul()(model)
    FoldTransposedWeights()(model)
    assert operations(model) == ["MatMul", "Add"]
    assert model.graph.initializers["w"].const_value.numpy().tolist() == [[1, 3, 5], [2, 4, 6]]
    x = np.array([[1.0, 2.0]], dtype=np.float32)
    assert run(model, x).tolist() == [[15, 31, 47]]


def test_a_scaled_gemm_stays() -> None:
    model = ir.from_onnx_text(GEMM.replace("transB=1", "transB=1, alpha=2.0"))
    assert not GemmToMatMul()(model).modified
    assert operations(model) == ["Gemm"]


def test_a_weight_that_is_used_as_it_is_too_keeps_its_transpose() -> None:
    model = ir.from_onnx_text(SHARED)
    assert not FoldTransposedWeights()(model).modified
    assert operations(model) == ["Transpose", "MatMul", "Neg"]


def test_only_right_sides_of_matmuls_are_weights_of_linears() -> None:
    assert [value.name for value in linear_weights(ir.from_onnx_text(MATMUL))] == ["w"]
    assert linear_weights(ir.from_onnx_text(SHARED)) == []


def int4_weight() -> BlockedWeight:
    values = np.array([[1, -2], [3, 4], [5, 6], [7, -8]], dtype=ir.DataType.INT4.numpy())
    scales = np.array([[0.5, 1.0], [2.0, 0.25]], dtype=np.float16)
    return BlockedWeight(values=ir.tensor(values, name="w"), scales=ir.tensor(scales), group_size=2)


def test_a_quantised_weight_is_dequantised_in_blocks_along_its_inputs() -> None:
    model = ir.from_onnx_text(MATMUL)
    QuantizeWeights({"w": int4_weight()})(model)
    assert operations(model) == ["Cast", "DequantizeLinear", "MatMul"]
    assert model.graph.initializers["w"].dtype == ir.DataType.INT4
    expected = [[0.5, -2.0], [1.5, 4.0], [10.0, 1.5], [14.0, -2.0]]
    np.testing.assert_array_equal(run(model, np.eye(4, dtype=np.float32)), expected)


def test_a_float16_graph_takes_the_scales_without_a_cast() -> None:
    model = ir.from_onnx_text(MATMUL.replace("float[", "float16["))
    QuantizeWeights({"w": int4_weight()})(model)
    assert operations(model) == ["DequantizeLinear", "MatMul"]


def test_a_weight_that_is_no_linears_is_not_quantised() -> None:
    with pytest.raises(PreconditionError, match="nowhere"):
        QuantizeWeights({"nowhere": int4_weight()})(ir.from_onnx_text(MATMUL))


def test_a_stored_weight_of_another_type_is_cast_to_the_graphs() -> None:
    model = ir.from_onnx_text(MATMUL)
    StoreWeights({"w": ir.tensor(np.full((4, 2), 2.0, dtype=np.float16), name="w")})(model)
    assert operations(model) == ["Cast", "MatMul"]
    assert run(model, np.ones((1, 4), dtype=np.float32)).tolist() == [[8, 8]]
