"""Graphs that are not what was meant are named, each fault by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from export.errors import ExportError
from export.lint import lint_graphs
from export.passes import BlockedWeight, QuantizeWeights
from export.weights import WEIGHTS, WeightFile

GRAPH = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 64] x) => (float[n, 2] y)
{ y = MatMul(x, w) }
"""
BITS = {"w": 4}


def written(directory: Path, edit: Callable[[ir.Model], None] = lambda _: None) -> Path:
    """A matrix product with a weight in 4 bits, as an export writes it."""
    text = GRAPH.replace("{ y", "<float[64, 2] w = {" + ", ".join(["1"] * 128) + "}>\n{ y")
    model = ir.from_onnx_text(text)
    with WeightFile(directory) as file:
        packed = ir.PackedTensor(np.full(64, 0x11, np.uint8), ir.DataType.INT4, shape=ir.Shape([64, 2]))
        stored = BlockedWeight(
            values=file.store("w", packed),
            scales=file.store("w.scale", ir.Tensor(np.ones((1, 2), np.float16))),
            group_size=64,
        )
    QuantizeWeights({"w": stored})(model)
    edit(model)
    ir.save(model, directory / "model.onnx")
    return directory / "model.onnx"


def test_a_graph_as_it_was_meant_passes(tmp_path: Path) -> None:
    lint_graphs([written(tmp_path)], BITS)


def newer(model: ir.Model) -> None:
    model.ir_version = 11


def other_opset(model: ir.Model) -> None:
    model.graph.opset_imports["com.microsoft"] = 1


def double(model: ir.Model) -> None:
    node = ir.node("Cast", [model.graph.inputs[0]], attributes={"to": int(ir.DataType.DOUBLE)})
    node.outputs[0].name = "wide"
    model.graph.append(node)


def folded(model: ir.Model) -> None:
    array = np.zeros((1024, 300), np.float32)
    value = ir.Value(name="folded", const_value=ir.Tensor(array), shape=ir.Shape(array.shape))
    value.dtype = ir.DataType.FLOAT
    model.graph.initializers.add(value)


def read_otherwise(model: ir.Model) -> None:
    (node,) = (node for node in model.graph if node.op_type == "DequantizeLinear")
    extra = ir.node("Neg", [node.outputs[0]])
    extra.outputs[0].name = "negated"
    model.graph.append(extra)


def elsewhere(model: ir.Model) -> None:
    value = model.graph.initializers["w"]
    tensor = value.const_value
    assert isinstance(tensor, ir.ExternalTensor)
    value.const_value = ir.ExternalTensor(
        "/etc/weights.data", 0, 64, tensor.dtype, shape=tensor.shape, name="w", base_dir="/"
    )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (newer, "IR version is 11"),
        (other_opset, "operator sets .*com.microsoft"),
        (double, "64-bit floats: wide"),
        (folded, "folded is 1228800 bytes inside the graph"),
        (read_otherwise, "w is not read by matrix products"),
        (elsewhere, "w lies in /etc/weights.data"),
    ],
)
def test_each_fault_is_named(tmp_path: Path, edit: Callable[[ir.Model], None], message: str) -> None:
    path = written(tmp_path, edit)
    with pytest.raises(ExportError, match=message):
        lint_graphs([path], BITS)


def test_a_weight_that_is_not_in_few_bits_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="w is stored as INT4, not in 8 bits"):
        lint_graphs([written(tmp_path)], {"w": 8})


def test_bytes_that_belong_to_nothing_and_missing_ones_are_named(tmp_path: Path) -> None:
    path = written(tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(data + bytes(100))
    with pytest.raises(ExportError, match="100 bytes at its end belong to no tensor"):
        lint_graphs([path], BITS)
    (tmp_path / WEIGHTS).write_bytes(data[:-2])
    with pytest.raises(ExportError, match=r"w\.scale lies beyond the end"):
        lint_graphs([path], BITS)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "elsewhere").write_bytes(data)
    (tmp_path / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ExportError, match="symbolic link"):
        lint_graphs([path], BITS)


def test_operators_of_others_are_named_unless_they_are_the_one_that_was_meant(tmp_path: Path) -> None:
    def fuse(model: ir.Model) -> None:
        x, y = model.graph.inputs[0], model.graph.outputs[0]
        node = ir.node("MultiHeadAttention", [x], {"num_heads": 1}, domain="com.microsoft")
        node.outputs[0].name = "z"
        model.graph.append(node)
        model.opset_imports["com.microsoft"] = 1
        assert y.name == "y"

    path = written(tmp_path, fuse)
    lint_graphs([path], BITS, fused=["model.onnx"])
    with pytest.raises(ExportError, match="operators that are not of ONNX: MultiHeadAttention"):
        lint_graphs([path], BITS)
