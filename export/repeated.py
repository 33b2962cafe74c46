"""The graph of many layers from a trace of three: the first, one of those between, and the last.

Tracing takes a second a layer. Published encoders have up to 32, and but for the first, where T5 has its bias
of positions, one is like the other.
"""

from __future__ import annotations

import onnx_ir as ir

from export.errors import ExportError
from export.passes import is_transposed, set_transposed

__all__ = ["TRACED", "repeat_layer"]

TRACED = 3
"""Layers of a trace."""


def repeat_layer(graph: ir.Graph, layers: str, count: int, before: ir.Value, after: ir.Value) -> None:
    """Put in copies of the second of three layers until there are so many, in place.

    Weights of the copies have the names that they have in the longer module, and no values.

    Args:
        graph: Of a module with three layers, its weights under the names that they have there.
        layers: Name of the list that the layers are in.
        count: Of the layers there are to be, at least three.
        before: What the second layer is given.
        after: What it gives.

    Raises:
        ExportError: What the second layer computes is used by others too.
    """
    own = _nodes_between(graph, f"{layers}.1.", before, after)
    _require_closed(own, after)
    following = [(use.node, use.idx) for use in after.uses()]
    for value in list(graph.initializers.values()):
        if str(value.name).startswith(f"{layers}.2."):
            graph.initializers.pop(str(value.name))
            value.name = _renamed(value, layers, 2, count - 1)
            graph.initializers.add(value)
    stream, last = after, own[-1]
    for index in range(2, count - 1):
        nodes, stream = _copied(graph, own, layers, index, {before: stream}, after)
        graph.insert_after(last, nodes)
        last = nodes[-1]
    for node, index in following:
        node.replace_input_with(index, stream)
    if stream is not after and after in graph.outputs:
        stream.name, after.name = after.name, f"{after.name}.1"
        stream.shape, stream.type = after.shape, after.type
        graph.outputs[:] = [stream if value is after else value for value in graph.outputs]


def _nodes_between(graph: ir.Graph, prefix: str, before: ir.Value, after: ir.Value) -> list[ir.Node]:
    """The nodes of a layer, in order: what its input and its weights lead to, and what leads out of it."""
    touched = {before} | {value for name, value in graph.initializers.items() if name.startswith(prefix)}
    reached = []
    for node in graph:
        if not touched.isdisjoint(value for value in node.inputs if value is not None):
            touched.update(node.outputs)
            reached.append(node)
    needed, nodes = {after}, []
    for node in reversed(reached):
        if not needed.isdisjoint(node.outputs):
            needed.update(value for value in node.inputs if value is not None)
            nodes.append(node)
    return nodes[::-1]


def _require_closed(own: list[ir.Node], after: ir.Value) -> None:
    members = set(own)
    for value in (value for node in own for value in node.outputs if value is not after):
        if value.is_graph_output() or any(use.node not in members for use in value.uses()):
            raise ExportError(
                f"A layer cannot be repeated, for others use what it computes on its way ({value.name}). "
                "Please report the model."
            )


def _copied(
    graph: ir.Graph,
    own: list[ir.Node],
    layers: str,
    index: int,
    known: dict[ir.Value, ir.Value],
    after: ir.Value,
) -> tuple[list[ir.Node], ir.Value]:
    """Copies of a layer's nodes with weights of their own, and what they give in the place of `after`."""
    nodes = []
    for node in own:
        for value in node.inputs:
            if value is not None and value not in known and str(value.name).startswith(f"{layers}.1."):
                known[value] = ir.Value(
                    name=_renamed(value, layers, 1, index), shape=value.shape, type=value.type
                )
                set_transposed(known[value], transposed=is_transposed(value))
                graph.initializers.add(known[value])
        copy = ir.Node(
            node.domain,
            node.op_type,
            [None if value is None else known.get(value, value) for value in node.inputs],
            node.attributes.values(),
            overload=node.overload,
            num_outputs=len(node.outputs),
            version=node.version,
        )
        for value, made in zip(node.outputs, copy.outputs, strict=True):
            made.name = f"{value.name}.{index}"
            known[value] = made
        nodes.append(copy)
    return nodes, known[after]


def _renamed(value: ir.Value, layers: str, old: int, new: int) -> str:
    return f"{layers}.{new}.{str(value.name).removeprefix(f'{layers}.{old}.')}"
