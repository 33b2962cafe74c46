"""A last look at finished graphs as they lie on disk: what a runtime is going to read is what was meant."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from export.errors import ExportError
from export.fused import DOMAIN, FUSED
from export.lower import OPSET
from export.weights import ALIGNMENT, WEIGHTS

__all__ = ["lint_graphs"]

_IR_VERSION = 10  # onnxruntime's latest release reads it; what onnx writes by default is often newer
_LARGE = 1 << 20
_TYPES = {4: ir.DataType.INT4, 8: ir.DataType.INT8}


def lint_graphs(paths: Sequence[Path], quantized: Mapping[str, int], *, fused: Collection[str] = ()) -> None:
    """Check all graphs of a component together, for they share one file of weights.

    Args:
        paths: In one directory, `weights.data` beside them.
        quantized: Bits of the weights that were stored in few, by name.
        fused: Names of the graphs that have operators of onnxruntime's own.

    Raises:
        ExportError: Something is not as it should be; all that is wrong is named.
    """
    faults: list[str] = []
    used: list[tuple[int, int]] = []
    size = (paths[0].parent / WEIGHTS).stat().st_size
    for path in paths:
        model = ir.load(path)
        faults += (
            f"{path.name}: {fault}" for fault in _faults(model, quantized, size, fused=path.name in fused)
        )
        used += (
            (tensor.offset or 0, tensor.length or 0)
            for value in model.graph.initializers.values()
            if isinstance(tensor := value.const_value, ir.ExternalTensor)
        )
    faults += (f"{WEIGHTS}: {fault}" for fault in _file_faults(paths[0].parent / WEIGHTS, used))
    if faults:
        shown = "; ".join(faults[:5])
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ExportError(
            f"The finished graphs in {paths[0].parent.name} are not as they should be: {shown}{more}. "
            "Nothing was written; please report the model."
        )


def _faults(model: ir.Model, quantized: Mapping[str, int], size: int, *, fused: bool) -> Iterator[str]:
    if model.ir_version > _IR_VERSION:
        yield f"its IR version is {model.ir_version}, above {_IR_VERSION}"
    wanted = {"": OPSET} | ({DOMAIN: 1} if fused else {})
    if model.opset_imports != wanted:
        yield f"it asks for the operator sets {model.opset_imports}, not for {wanted}"
    foreign = {node.op_type for node in model.graph if node.domain or node.op_type in FUSED}
    foreign -= FUSED if fused else set()
    if foreign:
        yield f"operators that are not of ONNX: {', '.join(sorted(foreign))}"
    for name, bits in quantized.items():
        value = model.graph.initializers.get(name)
        if value is None or value.dtype != _TYPES[bits]:
            yield f"{name} is stored as {None if value is None else value.dtype}, not in {bits} bits"
        elif not _is_read_as_blocks(value):
            yield f"{name} is not read by matrix products through blocked dequantisation alone"
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            yield f"{name} has no value"
        elif isinstance(tensor, ir.ExternalTensor):
            if str(tensor.location) != WEIGHTS:
                yield f"{name} lies in {tensor.location!s}, not in {WEIGHTS} beside the graph"
            elif (tensor.offset or 0) + (tensor.length or 0) > size:
                yield f"{name} lies beyond the end of {WEIGHTS}"
        elif tensor.nbytes > _LARGE:
            yield f"{name} is {tensor.nbytes} bytes inside the graph: a weight was folded back"
    values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    doubles = {value.name for value in values if value.dtype == ir.DataType.DOUBLE}
    doubles |= {
        node.outputs[0].name
        for node in model.graph
        if node.op_type == "Cast" and node.attributes.get_int("to", 0) == ir.DataType.DOUBLE
    }
    if doubles:
        yield f"64-bit floats: {', '.join(sorted(map(str, doubles)))}"


def _is_read_as_blocks(value: ir.Value) -> bool:
    uses = list(value.uses())
    return bool(uses) and all(
        use.node.op_type == "DequantizeLinear"
        and use.idx == 0
        and use.node.attributes.get_int("block_size", 0) > 0
        and all(
            product.node.op_type == "MatMul" and product.idx == 1 for product in use.node.outputs[0].uses()
        )
        for use in uses
    )


def _file_faults(path: Path, used: Sequence[tuple[int, int]]) -> Iterator[str]:
    if path.is_symlink():
        yield "it is a symbolic link, which runtimes refuse"
    end = 0
    for offset, length in sorted(set(used)):
        if offset - end >= ALIGNMENT:
            yield f"{offset - end} bytes at {end} belong to no tensor"
        end = max(end, offset + length)
    if path.stat().st_size - end >= ALIGNMENT:
        yield f"{path.stat().st_size - end} bytes at its end belong to no tensor"
