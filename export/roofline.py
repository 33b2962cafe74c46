"""The least time a step can take on a device, from what its operators compute and move.

A roofline (Williams, Waterman and Patterson, 2009): a class of operators takes as long as its arithmetic at
the device's peak rate, or as moving its bytes at the peak bandwidth, whichever is longer. No device reaches
either, so this is a bound that a step cannot go below, and no forecast.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from export.liveness import attention_scores
from export.sized import SizedGraph, SizedNode

__all__ = ["Work", "least_seconds", "work_of"]

Kind = Literal["linears", "attention", "rest"]

_VIEWS = {"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one class of operators does in a step."""

    kind: Kind
    flops: int
    """A multiplication and an addition count as two."""
    activation_bytes: int
    """Read and written, in the types of the graph."""


def work_of(graph: SizedGraph) -> list[Work]:
    """Return the work of the linears, of attention and of everything else.

    The scores of attention count as never leaving the processor, and neither do values between one product
    and the next: all that lies between two products is taken for one pass over what it begins with.
    """
    scores = attention_scores(graph)
    flops: dict[Kind, int] = {"linears": 0, "attention": 0, "rest": 0}
    moved: dict[Kind, int] = {"linears": 0, "attention": 0, "rest": 0}
    dynamic = {name for node in graph.nodes for name in node.outputs} | set(graph.inputs)
    for node in graph.nodes:
        if node.op_type in _VIEWS:
            continue
        kind = _kind(node, dynamic)
        flops[kind] += _flops(graph, node)
        if kind != "rest":
            values = {*(name for name in node.inputs if name in dynamic), *node.outputs} - scores
            moved[kind] += sum(graph.num_bytes[name] for name in values)
    return [Work(kind=kind, flops=flops[kind], activation_bytes=moved[kind]) for kind in flops]


def least_seconds(
    work: list[Work], *, weight_bytes: int, activation_scale: float, peak_tflops: float, bandwidth_gb_s: float
) -> float:
    """Return the seconds below which a step cannot go.

    Args:
        work: Of one step.
        weight_bytes: As they are stored; each is read once.
        activation_scale: Bytes of an activation on the device by those of the graph.
        peak_tflops: Of the device, in 10^12 FLOP a second.
        bandwidth_gb_s: Of its memory, in 10^9 bytes a second.
    """
    seconds = 0.0
    for item in work:
        moved = activation_scale * item.activation_bytes + (weight_bytes if item.kind == "linears" else 0)
        seconds += max(item.flops / (1e12 * peak_tflops), moved / (1e9 * bandwidth_gb_s))
    return seconds


def _kind(node: SizedNode, dynamic: set[str]) -> Kind:
    if node.op_type in ("Conv", "Gemm"):
        return "linears"
    if node.op_type == "MatMul":
        return "attention" if node.inputs[1] in dynamic else "linears"
    return "rest"


def _flops(graph: SizedGraph, node: SizedNode) -> int:
    size = prod(graph.shapes[node.outputs[0]])
    if node.op_type == "MatMul":
        return 2 * size * graph.shapes[node.inputs[0]][-1]
    if node.op_type == "Conv":
        return 2 * size * prod(graph.shapes[node.inputs[1]][1:])
    return size
