"""The most memory that a graph's activations take at once, from the lifetimes of its values.

A value lives from the node that makes it to the last that reads it. As in onnxruntime, a view shares the
memory of what it shows, and an elementwise operator writes over an input that nothing reads after it.
"""

from __future__ import annotations

from export.sized import SizedGraph

__all__ = ["activation_bytes", "attention_scores"]

_VIEWS = {"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
_ELEMENTWISE = {
    *("Add", "Cast", "Cos", "Div", "Erf", "Exp", "Gelu", "Mul", "Neg", "Pow", "Reciprocal", "Relu"),
    *("Sigmoid", "Sin", "Sqrt", "Sub", "Tanh"),
}


def activation_bytes(graph: SizedGraph, *, fused_attention: bool = False) -> int:
    """Return the most bytes that values take at once, the graph's inputs included.

    Args:
        graph: At the size in question.
        fused_attention: Whether the scores of attention never lie in memory together, as in an engine.
    """
    last = {name: index for index, node in enumerate(graph.nodes) for name in node.inputs}
    hidden = attention_scores(graph) if fused_attention else frozenset()
    owner = {name: name for name in graph.inputs}  # of the memory that a value lies in
    users = dict.fromkeys(graph.inputs, 1)  # values that lie in it and are still to be read
    alive = sum(graph.num_bytes[name] for name in graph.inputs)
    peak = alive
    for index, node in enumerate(graph.nodes):
        dying = [name for name in dict.fromkeys(node.inputs) if name in owner and last[name] == index]
        for name in node.outputs:
            if not name:
                continue
            place = _place(graph, node.op_type, name, node.inputs, dying, owner, users)
            owner[name] = place or name
            users[owner[name]] = users.get(owner[name], 0) + 1
            if place is None and name not in hidden:
                alive += graph.num_bytes[name]
        peak = max(peak, alive)
        for name in [*dying, *(name for name in node.outputs if name and name not in last)]:
            users[owner[name]] -= 1
            if users[owner[name]] == 0 and owner[name] not in hidden:
                alive -= graph.num_bytes[owner[name]]
    return peak


def attention_scores(graph: SizedGraph) -> frozenset[str]:
    """Return the values between the two products of each attention: scores, and their softmax."""
    makers = {name: node for node in graph.nodes for name in node.outputs}
    found: set[str] = set()
    for node in graph.nodes:
        if node.op_type != "Softmax":
            continue
        found.update(node.outputs)
        name = node.inputs[0]
        while name in makers and makers[name].op_type in ("MatMul", "Mul", "Add", "Cast", "Div"):
            found.add(name)
            if makers[name].op_type == "MatMul":
                break
            name = makers[name].inputs[0]
    return frozenset(found)


def _place(
    graph: SizedGraph,
    op_type: str,
    output: str,
    inputs: tuple[str, ...],
    dying: list[str],
    owner: dict[str, str],
    users: dict[str, int],
) -> str | None:
    """Return the memory that an output shares; None if it needs its own."""
    if op_type in _VIEWS:
        return owner.get(inputs[0])
    if op_type in _ELEMENTWISE:
        for name in dying:
            place = owner[name]
            if users[place] == 1 and graph.num_bytes[place] == graph.num_bytes[output]:
                return place
    return None
