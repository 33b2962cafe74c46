"""Graph rewrites, as onnx-ir passes: one canonical form for linears, then weights stored in fewer bits.

In the canonical form every linear is `MatMul(x, weight)` with the weight stored as [inputs, outputs]: tracing
gives a transposed weight for three dimensions and a Gemm for two, and blocked quantisation needs one layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir import passes
from onnx_ir.passes import common

__all__ = [
    "BlockedWeight",
    "FoldTransposedWeights",
    "GemmToMatMul",
    "QuantizeWeights",
    "StoreWeights",
    "StripAnnotations",
    "as_inputs",
    "canonicalize",
    "is_transposed",
    "linear_weights",
    "parameters",
    "set_transposed",
]

_TRANSPOSED = "transposed"


@dataclass(frozen=True, kw_only=True)
class BlockedWeight:
    """A linear's weight [K, N] in blocks of `group_size` along K."""

    values: ir.TensorProtocol
    """INT4 or INT8 [K, N]."""
    scales: ir.TensorProtocol
    """FLOAT16 [K / group_size, N], all above zero."""
    group_size: int


def canonicalize(model: ir.Model) -> None:
    """Bring a freshly traced model into the canonical form, in place. Initialisers may still lack values."""
    onnxscript.optimizer.optimize(model, num_iterations=1)  # a second finds nothing and takes as long
    passes.Sequential(
        GemmToMatMul(),
        FoldTransposedWeights(),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        StripAnnotations(),
    )(model)


def linear_weights(model: ir.Model) -> list[ir.Value]:
    """Return the initialisers [K, N] that are the right side of MatMuls and of nothing else."""
    found: dict[str, ir.Value] = {}
    for node in model.graph:
        if node.op_type == "MatMul":
            weight = node.inputs[1]
            if weight is not None and weight.name and _is_matrix(weight):
                found[weight.name] = weight
    return [
        value
        for value in found.values()
        if all(use.node.op_type == "MatMul" and use.idx == 1 for use in value.uses())
    ]


def parameters(model: ir.Model) -> dict[str, ir.Value]:
    """Return the initialisers that are a module's parameters; all others are small constants."""
    return {
        name: value
        for name, value in model.graph.initializers.items()
        if isinstance(value.const_value, ir.LazyTensor)
    }


def is_transposed(value: ir.Value) -> bool:
    """Whether an initialiser without a value is to be given the transpose of the parameter of its name."""
    return bool(value.meta.get(_TRANSPOSED, False))


def set_transposed(value: ir.Value, *, transposed: bool) -> None:
    """Say whether it is."""
    value.meta[_TRANSPOSED] = transposed


def as_inputs(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """A copy whose initialisers of some names, which may have no values, are inputs behind its own."""
    copy = model.clone()
    for name in names:
        value = copy.graph.initializers.pop(name)
        value.const_value = None
        copy.graph.inputs.append(value)
    return copy


class GemmToMatMul(passes.InPlacePass):
    """Gemm with a stored second operand becomes MatMul and Add; a transposition becomes a node of its own."""

    def call(self, model: ir.Model) -> passes.PassResult:
        modified = False
        for node in list(model.graph):
            if not _is_linear_gemm(node):
                continue
            left, weight, *bias = node.inputs
            assert left is not None
            assert weight is not None
            nodes = []
            if node.attributes.get_int("transB", 0):
                nodes.append(ir.node("Transpose", [weight], attributes={"perm": [1, 0]}))
                weight = nodes[-1].outputs[0]
            nodes.append(ir.node("MatMul", [left, weight]))
            if bias and bias[0] is not None:
                nodes.append(ir.node("Add", [nodes[-1].outputs[0], bias[0]]))
            _replace(model, node, nodes)
            modified = True
        return passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        if left := [node.name for node in model.graph if _is_linear_gemm(node)]:
            raise passes.PostconditionError(f"Gemm nodes are left: {left}")


class FoldTransposedWeights(passes.InPlacePass):
    """Transpose(initialiser) becomes the initialiser, stored the other way round under its own name."""

    def call(self, model: ir.Model) -> passes.PassResult:
        modified = False
        for value in list(model.graph.initializers.values()):
            users = value.consumers()
            if not _is_matrix(value) or not users or not all(_is_transpose(user) for user in users):
                continue
            for node in users:
                node.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
                model.graph.remove(node, safe=True)
            value.shape = ir.Shape(reversed(list(value.shape or ())))
            if value.const_value is None:
                set_transposed(value, transposed=not is_transposed(value))
            else:
                value.const_value = _transpose(value.const_value)
            modified = True
        return passes.PassResult(model, modified)


class QuantizeWeights(passes.InPlacePass):
    """MatMul(x, weight) becomes MatMul(x, DequantizeLinear(values, scales)) in blocks along the input axis.

    The scales are stored in 16 bit. Where the activations are float32 they pass through a Cast, which a
    runtime folds at load, so that graphs of both types share the stored bytes.
    """

    def __init__(self, weights: Mapping[str, BlockedWeight]) -> None:
        super().__init__()
        self._weights = weights

    def requires(self, model: ir.Model) -> None:
        linears = {value.name for value in linear_weights(model)}
        if other := sorted(self._weights.keys() - linears):
            raise passes.PreconditionError(f"not weights of linears: {other}")

    def call(self, model: ir.Model) -> passes.PassResult:
        for name, stored in self._weights.items():
            weight = model.graph.initializers.pop(name)
            assert weight.dtype is not None
            values = _add_initializer(model, name, stored.values)
            scales: ir.Value = _add_initializer(model, f"{name}.scale", stored.scales)
            users = set(weight.consumers())
            nodes = []
            if weight.dtype != stored.scales.dtype:
                nodes.append(_cast(scales, weight.dtype))
                scales = nodes[-1].outputs[0]
            attributes = {"axis": 0, "block_size": stored.group_size}
            nodes.append(ir.node("DequantizeLinear", [values, scales], attributes=attributes))
            _name_outputs(nodes, name)
            weight.replace_all_uses_with(nodes[-1].outputs[0])
            model.graph.insert_before(next(node for node in model.graph if node in users), nodes)
        return passes.PassResult(model, bool(self._weights))

    def ensures(self, model: ir.Model) -> None:
        blocked = {
            node.inputs[0].name
            for node in model.graph
            if node.op_type == "DequantizeLinear" and node.inputs[0] is not None
        }
        if missing := sorted(self._weights.keys() - blocked):
            raise passes.PostconditionError(f"not quantised: {missing}")


class StoreWeights(passes.InPlacePass):
    """Initialisers are replaced by stored ones of their name; one of another type passes through a Cast."""

    def __init__(self, weights: Mapping[str, ir.TensorProtocol]) -> None:
        super().__init__()
        self._weights = weights

    def requires(self, model: ir.Model) -> None:
        if missing := sorted(self._weights.keys() - model.graph.initializers.keys()):
            raise passes.PreconditionError(f"not initialisers of the graph: {missing}")

    def call(self, model: ir.Model) -> passes.PassResult:
        casts = []
        for name, stored in self._weights.items():
            value = model.graph.initializers[name]
            assert value.dtype is not None
            if value.dtype == stored.dtype:
                value.const_value = stored
                continue
            model.graph.initializers.pop(name)
            cast = _cast(_add_initializer(model, name, stored), value.dtype)
            _name_outputs([cast], name)
            value.replace_all_uses_with(cast.outputs[0])
            casts.append(cast)
        if casts:
            model.graph.insert_before(model.graph[0], casts)
        return passes.PassResult(model, bool(self._weights))


class StripAnnotations(passes.InPlacePass):
    """Remove what only a reader of the trace wants: shapes of intermediate values, metadata, doc strings.

    Runtimes infer the shapes again, and the traced ones are wrong once a pass has changed the graph.
    """

    def call(self, model: ir.Model) -> passes.PassResult:
        common.ClearMetadataAndDocStringPass()(model)
        kept = {id(value) for value in model.graph.outputs}
        for node in model.graph:
            for value in node.outputs:
                if id(value) not in kept:
                    value.shape, value.type = None, None
        return passes.PassResult(model, True)


def _is_matrix(value: ir.Value) -> bool:
    return value.is_initializer() and value.shape is not None and len(value.shape) == 2


def _is_linear_gemm(node: ir.Node) -> bool:
    if node.op_type != "Gemm" or node.inputs[1] is None or not _is_matrix(node.inputs[1]):
        return False
    scaled = any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta"))
    return not scaled and not node.attributes.get_int("transA", 0)


def _is_transpose(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [1, 0])) == [1, 0]


def _transpose(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def read() -> ir.Tensor[Any]:
        return ir.Tensor(np.ascontiguousarray(tensor.numpy().T), name=tensor.name)

    shape = ir.Shape(reversed(tensor.shape.numpy()))
    return ir.LazyTensor(read, dtype=tensor.dtype, shape=shape, name=tensor.name)


def _replace(model: ir.Model, node: ir.Node, nodes: list[ir.Node]) -> None:
    old, new = node.outputs[0], nodes[-1].outputs[0]
    for number, inserted in enumerate(nodes[:-1]):
        inserted.outputs[0].name = f"{old.name}.{number}"
    new.name, new.shape, new.type = old.name, old.shape, old.type
    model.graph.insert_before(node, nodes)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)


def _add_initializer(model: ir.Model, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    assert isinstance(tensor.shape, ir.Shape)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.initializers.add(value)
    return value


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    return ir.node("Cast", [value], attributes={"to": int(dtype)})


def _name_outputs(nodes: list[ir.Node], name: str) -> None:
    for node in nodes:
        node.outputs[0].name = f"{name}.{node.op_type.lower()}"
