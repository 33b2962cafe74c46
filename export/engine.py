"""TensorRT-RTX engines, built through Polygraphy; no GPU is needed to build one."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir

from export.errors import ExportError

__all__ = ["build_engine", "require_tensorrt_rtx"]

# An engine holds the graph's weights and, for each optimisation profile, code that grows with the nodes:
# 11 to 14 kB a node were measured. Where weights are the larger part, as with billions of parameters,
# 4 bits expanded to 16 exceed this bound; in a model of a few megabytes the code hides them, and only gross
# errors show.
_MOST_OF_WEIGHTS = 1.5
_MOST_CODE_BYTES_PER_NODE = 24 * 1024
_LEAST_OF_WEIGHTS = 0.5


def build_engine(
    graph: Path,
    engine: Path,
    *,
    compute_capability: str,
    latent_sizes: Sequence[tuple[int, int]],
    num_tokens: int,
    max_batch: int,
) -> None:
    """Build the transformer's engine for one kind of GPU.

    Args:
        graph: The transformer's ONNX file; the engine computes in the types the graph names.
        engine: Where the engine goes; it appears when it is whole.
        compute_capability: Of the GPU, as in "8.9".
        latent_sizes: Heights and widths, with one optimisation profile each, in this order.
        num_tokens: Text tokens of a prompt.
        max_batch: Most pictures at a time; guidance doubles the batch on top of it.

    Raises:
        ExportError: TensorRT-RTX is missing, refuses the graph or the GPU, or makes an engine of a size that
            shows the weights were not taken as they are.
    """
    rtx = require_tensorrt_rtx()
    major, minor = (int(part) for part in compute_capability.split("."))
    profiles = []
    for size in latent_sizes:
        profile = rtx.Profile()
        for name, (least, usual, most) in _shapes(graph, size, num_tokens, max_batch).items():
            profile.add(name, min=least, opt=usual, max=most)
        profiles.append(profile)
    try:
        with rtx.logger.verbosity(rtx.logger.CRITICAL):
            network = rtx.network_from_onnx_path(str(graph), strongly_typed=True)
            config = rtx.CreateConfigRTX(compute_capabilities=[(major, minor)], profiles=profiles)
            data = memoryview(rtx.engine_bytes_from_network(network, config))
    except rtx.PolygraphyException as error:
        raise ExportError(
            f"TensorRT-RTX could not build an engine from {graph.name} for compute capability "
            f"{compute_capability}: {error}. Choose another --target, or report this graph."
        ) from error
    loaded = ir.load(graph)
    _require_size(
        data.nbytes,
        weight_bytes=_weight_bytes(loaded),
        num_nodes=len(loaded.graph),
        num_profiles=len(profiles),
        name=graph.name,
    )
    engine.parent.mkdir(parents=True, exist_ok=True)
    beside = engine.with_name(f".{engine.name}.part")
    beside.write_bytes(data)
    beside.replace(engine)


def require_tensorrt_rtx() -> SimpleNamespace:
    """Return what of Polygraphy is needed, set up for TensorRT-RTX.

    Raises:
        ExportError: It is not installed, or Polygraphy was loaded for plain TensorRT before.
    """
    missing = [name for name in ("tensorrt_rtx", "polygraphy") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"This target needs an engine, and {' and '.join(missing)} is not installed to build it: "
            "run `pip install 'hptool[rtx]'`, or export with --target cpu-x86."
        )
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # read once, when the next line is run first
    if not importlib.import_module("polygraphy.config").USE_TENSORRT_RTX:
        raise ExportError(
            "Polygraphy was loaded for plain TensorRT in this process. "
            "Set POLYGRAPHY_USE_TENSORRT_RTX=1 before it is imported, or run the export in its own process."
        )
    trt = importlib.import_module("polygraphy.backend.trt")
    return SimpleNamespace(
        CreateConfigRTX=importlib.import_module("polygraphy.backend.tensorrt_rtx").CreateConfigRTX,
        PolygraphyException=importlib.import_module("polygraphy.exception").PolygraphyException,
        Profile=trt.Profile,
        engine_bytes_from_network=trt.engine_bytes_from_network,
        logger=importlib.import_module("polygraphy.logger").G_LOGGER,
        network_from_onnx_path=trt.network_from_onnx_path,
    )


def _shapes(
    graph: Path, size: tuple[int, int], num_tokens: int, max_batch: int
) -> dict[str, tuple[list[int], list[int], list[int]]]:
    """Return each input's least, usual and largest shape."""
    known = {"encoder_hidden_states": {1: num_tokens}, "hidden_states": {2: size[0], 3: size[1]}}
    shapes = {}
    for value in ir.load(graph).graph.inputs:
        assert value.name is not None
        assert value.shape is not None
        dims = {1 + i: dim for i, dim in enumerate(value.shape[1:])} | known.get(value.name, {})
        rest = [_integer(dims[axis]) for axis in sorted(dims)]
        shapes[value.name] = ([1, *rest], [2, *rest], [2 * max_batch, *rest])
    return shapes


def _integer(dim: Any) -> int:
    assert isinstance(dim, int), f"a dimension without a size: {dim}"
    return dim


def _weight_bytes(model: ir.Model) -> int:
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _require_size(
    engine_bytes: int, *, weight_bytes: int, num_nodes: int, num_profiles: int, name: str
) -> None:
    least = _LEAST_OF_WEIGHTS * weight_bytes
    most = _MOST_OF_WEIGHTS * weight_bytes + _MOST_CODE_BYTES_PER_NODE * num_nodes * num_profiles
    if not least <= engine_bytes <= most:
        raise ExportError(
            f"The engine of {name} has {engine_bytes} bytes where {weight_bytes} bytes of weights let "
            f"expect {least:.0f} to {most:.0f}: its weights were not taken as stored. Report this graph."
        )
