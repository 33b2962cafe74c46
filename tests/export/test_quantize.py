"""What is stored in 4 bits, how exactly, and that nothing is left out of the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from export.errors import ExportError
from export.quantize import StoredWeights, choose_group_size, store_weights
from export.weights import WEIGHTS, WeightFile

Array = np.ndarray[Any, Any]


def linear_graph(**weights: Array) -> ir.Model:
    """One MatMul for each weight [K, N], read lazily as a lowered module's are."""
    inputs, nodes = [], []
    graph_weights = []
    for name, array in weights.items():
        name = name.replace("__", ".")
        tensor = ir.tensor(array, name=name)
        lazy = ir.LazyTensor(lambda t=tensor: t, dtype=tensor.dtype, shape=tensor.shape, name=name)
        weight = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=lazy)
        x = ir.Value(
            name=f"x.{name}", shape=ir.Shape([1, array.shape[0]]), type=ir.TensorType(ir.DataType.FLOAT)
        )
        inputs.append(x)
        graph_weights.append(weight)
        nodes.append(ir.node("MatMul", [x, weight]))
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=graph_weights, opset_imports={"": 21})
    return ir.Model(graph, ir_version=10)


def uniform(bits: int) -> Any:
    """Bits of all linears of blocks."""

    def bits_of(name: str) -> tuple[int, str]:
        if not name.startswith("transformer_blocks."):
            return (32 if bits == 32 else 16), "outside the transformer blocks"
        return bits, f"{bits} bits were asked for"

    return bits_of


def store(path: Path, model: ir.Model, bits: int) -> StoredWeights:
    weights = {
        name: torch.from_numpy(value.const_value.numpy())
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }
    with WeightFile(path) as file:
        return store_weights(model, weights, file, bits_of=uniform(bits))


@pytest.mark.parametrize(("size", "group"), [(128, 64), (2432, 64), (96, 48), (100, 50), (40, 40), (67, 1)])
def test_a_group_is_the_largest_divisor_up_to_the_limit(size: int, group: int) -> None:
    assert choose_group_size(size, 64) == group


def test_the_report_names_every_weight_and_why_it_was_skipped(tmp_path: Path) -> None:
    ones = np.ones((64, 2), dtype=np.float32)
    model = linear_graph(
        transformer_blocks__0__ff__weight=ones,
        transformer_blocks__0__prime__weight=np.ones((67, 2), dtype=np.float32),
        proj_out__weight=ones,
    )
    report = store(tmp_path, model, 4).report
    assert [(item.name, item.group_size, item.bytes) for item in report.quantized] == [
        ("transformer_blocks.0.ff.weight", 64, 64 + 4)
    ]
    assert [(item.name, item.bytes, item.reason) for item in report.skipped] == [
        (
            "transformer_blocks.0.prime.weight",
            67 * 2 * 2,
            "its 67 inputs divide into groups of 1, where 16 is the least",
        ),
        ("proj_out.weight", 64 * 2 * 2, "outside the transformer blocks"),
    ]


@pytest.mark.parametrize(("bits", "dtype"), [(16, np.float16), (32, np.float32)])
def test_wider_weights_are_stored_in_that_type(tmp_path: Path, bits: Any, dtype: type) -> None:
    model = linear_graph(transformer_blocks__0__ff__weight=np.full((64, 2), 0.1, dtype=np.float32))
    stored = store(tmp_path, model, bits)
    assert not stored.blocked
    kept = stored.plain["transformer_blocks.0.ff.weight"].numpy()
    np.testing.assert_array_equal(kept, np.full((64, 2), 0.1, dtype=dtype))


def test_a_weight_beyond_float16_is_refused_by_name(tmp_path: Path) -> None:
    model = linear_graph(proj_out__weight=np.full((64, 2), 1e5, dtype=np.float32))
    with pytest.raises(ExportError, match=r"'proj_out.weight' is not finite"):
        store(tmp_path, model, 4)


@pytest.mark.parametrize(("bits", "dtype"), [(4, ir.DataType.INT4), (8, ir.DataType.INT8)])
def test_torch_is_given_back_what_was_stored(tmp_path: Path, bits: int, dtype: ir.DataType) -> None:
    weight = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    stored = store(
        tmp_path, linear_graph(transformer_blocks__0__ff__weight=weight, bias__weight=weight), bits
    )
    (name,) = stored.blocked
    assert stored.blocked[name].values.dtype == dtype
    assert sorted(stored) == ["bias.weight", "transformer_blocks.0.ff.weight"]
    error = np.abs(stored[name].numpy() - weight).max() / np.abs(weight).max()
    assert 0 < error < 1 / 2 ** (bits - 1)
    np.testing.assert_array_equal(stored["bias.weight"].numpy(), weight.astype(np.float16))


def test_whether_a_parameter_is_there_is_told_without_reading_it(tmp_path: Path) -> None:
    weight = np.ones((64, 3), dtype=np.float32)
    stored = store(tmp_path, linear_graph(transformer_blocks__0__ff__weight=weight, bias__weight=weight), 4)
    (tmp_path / WEIGHTS).unlink()
    assert {"transformer_blocks.0.ff.weight", "bias.weight"} <= stored.keys()
    assert "weight" not in stored
