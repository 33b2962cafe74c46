"""Parts of a graph as sessions of their own, so that one larger than memory can be run to its end."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import ShapeInferencePass

from deploy.memory import give_back

__all__ = ["parity_session", "part_session", "run_in_pieces"]

Array = np.ndarray[Any, Any]

_PIECE_BYTES = 256 << 20
"""Of weights in a piece; onnxruntime holds them up to three times while it opens one."""


def run_in_pieces(
    path: Path,
    feeds: Sequence[Mapping[str, Array]],
    outputs: Sequence[str],
    *,
    most_bytes: int = _PIECE_BYTES,
) -> list[list[Array]]:
    """Run a graph on several inputs, no more of its weights in memory at a time than asked.

    Args:
        path: Of the graph, its weights beside it.
        feeds: Inputs by name, of any floating type.
        outputs: Names of what is wanted.
        most_bytes: Of weights in a piece; a single node may need more.

    Returns:
        The outputs for each of the inputs.
    """
    model = ir.load(path)
    ShapeInferencePass()(model)  # an input of a piece needs a type, and not every value in a file has one
    types = {value.name: value.dtype for value in model.graph.inputs}
    known = [{name: _typed(array, types[name]) for name, array in feed.items()} for feed in feeds]
    constants = _constants(model.graph)
    pieces = list(_pieces(model.graph, constants, most_bytes))
    for index, nodes in enumerate(pieces):
        made = {str(value.name) for node in nodes for value in node.outputs}
        given = sorted(_used(nodes, constants) - made)
        needed = _used([node for after in pieces[index + 1 :] for node in after], constants) | set(outputs)
        kept = sorted(made & needed)
        session = part_session(model, given, kept, path.parent)
        for values in known:
            found = session.run(kept, {name: values[name] for name in given})
            values |= dict(zip(kept, found, strict=True))
            for name in values.keys() - needed:
                del values[name]
        del session
        give_back()
    return [[values[name] for name in outputs] for values in known]


def part_session(
    model: ir.Model, inputs: Sequence[str], outputs: Sequence[str], directory: Path
) -> onnxruntime.InferenceSession:
    """Open the part of a graph between some values; its weights lie in the directory."""
    graph = ir.convenience.extract(model.graph, list(inputs), list(outputs))
    with tempfile.NamedTemporaryFile(dir=directory, suffix=".onnx") as file:
        ir.save(ir.Model(graph, ir_version=model.ir_version), file.name)
        return parity_session(Path(file.name))


def parity_session(path: Path) -> onnxruntime.InferenceSession:
    """A session that does what its graph says and rounds nothing that the graph does not round."""
    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = False  # it would keep what activations took at their most
    options.log_severity_level = 3  # graphs for other runtimes make it warn of what it has to convert
    # By default it rounds what is multiplied with 4-bit weights to 8 bits, a hundred times the error of sums.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _constants(graph: ir.Graph) -> dict[ir.Value, int]:
    """What is made of weights alone, and the bytes of these."""
    tensors = {value: value.const_value for value in graph.initializers.values()}
    found = {value: tensor.nbytes for value, tensor in tensors.items() if tensor is not None}
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if all(value in found for value in inputs):
            found |= dict.fromkeys(node.outputs, sum(found[value] for value in inputs))
    return found


def _pieces(graph: ir.Graph, constants: Mapping[ir.Value, int], most_bytes: int) -> Iterator[list[ir.Node]]:
    """The nodes that compute with inputs, in order; each piece brings along the constants it needs."""
    nodes: list[ir.Node] = []
    total = 0
    for node in graph:
        if all(value in constants for value in node.outputs):
            continue
        size = sum(constants.get(value, 0) for value in node.inputs if value is not None)
        if nodes and total + size > most_bytes:
            yield nodes
            nodes, total = [], 0
        nodes.append(node)
        total += size
    yield nodes


def _used(nodes: Sequence[ir.Node], constants: Mapping[ir.Value, int]) -> set[str]:
    """Names of what nodes are given that no constant is."""
    return {
        str(value.name)
        for node in nodes
        for value in node.inputs
        if value is not None and value not in constants
    }


def _typed(array: Array, dtype: ir.DataType | None) -> Array:
    return array.astype(np.float16) if dtype == ir.DataType.FLOAT16 else array
