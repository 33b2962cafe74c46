"""A graph at one size of its inputs: what each value then measures, without a weight or a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import onnx
import onnx_ir as ir
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

from export.errors import ExportError
from export.passes import as_inputs

__all__ = ["SizedGraph", "SizedNode", "size_graph"]


@dataclass(frozen=True, kw_only=True)
class SizedNode:
    """A node whose output depends on an input of the graph."""

    op_type: str
    inputs: tuple[str, ...]
    """Names of values, those of weights included."""
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SizedGraph:
    """A graph whose inputs have sizes."""

    inputs: tuple[str, ...]
    nodes: tuple[SizedNode, ...]
    """In the order they run; what depends on no input is computed when the graph is opened, and not here."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of every value, weights included."""
    num_bytes: Mapping[str, int]
    """The same, in the types of the graph."""


def size_graph(model: ir.Model, sizes: Mapping[str, Sequence[int]]) -> SizedGraph:
    """Work out the shape of every value.

    Args:
        model: Its weights need no values.
        sizes: Shape of each input, by name.

    Raises:
        ExportError: The shape of a value does not follow from those of the inputs.
    """
    # The shapes of weights matter here, and their values may not be there.
    weights = [
        name
        for name, value in model.graph.initializers.items()
        if isinstance(value.const_value, (ir.ExternalTensor, ir.LazyTensor))
    ]
    proto = ir.to_proto(as_inputs(model, weights))
    for value in proto.graph.input:
        if value.name in sizes:
            dims = value.type.tensor_type.shape.dim
            for dim, size in zip(dims, sizes[value.name], strict=True):
                dim.dim_value = size
    graph = SymbolicShapeInference.infer_shapes(proto, auto_merge=True).graph
    types = {value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info, *graph.output)}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    widths = {tensor.name: ir.DataType(tensor.data_type).itemsize for tensor in graph.initializer}
    for name, kind in types.items():
        if all(dim.HasField("dim_value") for dim in kind.shape.dim):
            shapes[name] = tuple(dim.dim_value for dim in kind.shape.dim)
            widths[name] = ir.DataType(kind.elem_type).itemsize
    nodes = _dynamic_nodes(graph, sizes)
    if unknown := [name for node in nodes for name in node.outputs if name not in shapes]:
        raise ExportError(f"The size of {unknown[0]!r} does not follow from the graph. Report this graph.")
    return SizedGraph(
        inputs=tuple(sizes),
        nodes=nodes,
        shapes=shapes,
        num_bytes={name: round(prod(shape) * widths[name]) for name, shape in shapes.items()},
    )


def _dynamic_nodes(graph: onnx.GraphProto, inputs: Mapping[str, Sequence[int]]) -> tuple[SizedNode, ...]:
    dynamic, nodes = set(inputs), []
    for node in graph.node:
        # A shape is known before anything runs, though it is taken of a value that is not.
        if node.op_type != "Shape" and not dynamic.isdisjoint(node.input):
            dynamic.update(node.output)
            nodes.append(
                SizedNode(op_type=node.op_type, inputs=tuple(node.input), outputs=tuple(node.output))
            )
    return tuple(nodes)
