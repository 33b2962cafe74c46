"""From torch modules to ONNX graphs: traced without weights, which are bound to the finished graph.

A module is traced as a copy whose parameters have shapes and no storage, so a graph costs memory by its nodes
and not by its weights. The initialisers keep the names of the torch parameters, and each is read from the
module, one at a time, when the graph is written.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from export.errors import ExportError
from export.fused import TRANSLATIONS, rotary_as_one
from export.passes import canonicalize, is_transposed
from export.traces import kept_trace
from toolchain.garbage import uncollected

__all__ = [
    "DTYPES",
    "Activations",
    "bind",
    "trace",
    "without_weights",
]

Activations = Literal["float32", "float16"]

OPSET = 21  # the first with blocked DequantizeLinear; 23 has no readers yet
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def without_weights(module: Any, dtype: torch.dtype) -> tuple[Any, FakeTensorMode]:
    """Copy a module's structure with parameters and buffers that have a shape and a type only."""
    fake = FakeTensorMode()
    memo: dict[int, Any] = {}
    with fake:
        for tensor in [*module.parameters(), *module.buffers()]:
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            empty = torch.empty(tensor.shape, dtype=kind)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    return copy.deepcopy(module, memo), fake


def trace(
    wrapper: nn.Module,
    fake: FakeTensorMode,
    inputs: Mapping[str, torch.Tensor],
    outputs: list[str],
    shapes: tuple[dict[int, Any], ...],
    *,
    fused: bool = False,
    about: Any = None,
) -> ir.Model:
    """Trace a module, or take what was traced of one like it.

    Args:
        wrapper: As `without_weights` gave it.
        fake: What it was made under, as the inputs.
        inputs: By their names in the graph.
        outputs: Names for what it gives.
        shapes: Which dimensions of each input are free.
        fused: Whether operators of onnxruntime's own are used (export/fused.py).
        about: What alone of the wrapper the trace hangs on; None says all of it.

    Raises:
        ExportError: The module makes constants while it runs.
    """
    facts = [wrapper if about is None else about, inputs, outputs, shapes, fused]
    return kept_trace(facts, lambda: _trace(wrapper, fake, inputs, outputs, shapes, fused=fused))


def _trace(
    wrapper: nn.Module,
    fake: FakeTensorMode,
    inputs: Mapping[str, torch.Tensor],
    outputs: list[str],
    shapes: tuple[dict[int, Any], ...],
    *,
    fused: bool,
) -> ir.Model:
    with fake, _quiet(), uncollected(), rotary_as_one() if fused else nullcontext():
        program = torch.onnx.export(
            wrapper.eval(),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            optimize=False,  # it would fold constants, and these weights have no values
            verbose=False,
            custom_translation_table=TRANSLATIONS if fused else None,
        )
    assert program is not None
    model = program.model
    named = (wrapper.named_parameters, wrapper.named_buffers)
    known = {name for each in named for name, _ in each(remove_duplicate=False)}
    for name, value in list(model.graph.initializers.items()):
        value.const_value = None
        model.graph.initializers.pop(name)
        value.name = name.removeprefix("module.")
        if name not in known:
            raise ExportError(
                f"The model makes the constant {value.name!r} while it runs, which cannot be exported. "
                "Keep it as a buffer of the module."
            )
        model.graph.initializers.add(value)
    with _quiet():
        canonicalize(model)
    return model


def bind(
    model: ir.Model, weights: Mapping[str, torch.Tensor], constants: Iterable[tuple[str, torch.Tensor]] = ()
) -> ir.Model:
    """Give each initialiser its value, in place: a constant at once, a weight when it is written.

    Args:
        model: As `trace` gave it.
        weights: By the initialisers' names.
        constants: Small buffers that the weights do not hold; they become part of the graph.

    Raises:
        ExportError: An initialiser is neither a constant nor one of the weights: the checkpoint lacks it.
    """
    fixed = dict(constants)
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue
        if name in weights:
            value.const_value = _lazy(name, weights, value)
        elif name in fixed:
            assert value.dtype is not None
            array = fixed[name].numpy().astype(value.dtype.numpy())
            value.const_value = ir.Tensor(array.T if is_transposed(value) else array, name=name)
        else:
            raise ExportError(
                f"The model's files lack the weight {name!r}. Download or save the model again."
            )
    return model


def _lazy(name: str, weights: Mapping[str, torch.Tensor], value: ir.Value) -> ir.LazyTensor:
    assert value.dtype is not None
    assert isinstance(value.shape, ir.Shape)
    dtype, transposed = value.dtype, is_transposed(value)

    def read() -> ir.Tensor[Any]:
        tensor = weights[name].detach().cpu()
        array = tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
        with np.errstate(over="ignore"):
            array = array.astype(dtype.numpy(), copy=False)
        converted = np.ascontiguousarray(array.T if transposed else array)
        check_finite(name, converted)
        return ir.Tensor(converted, name=name)

    return ir.LazyTensor(read, dtype=dtype, shape=value.shape, name=name)


def check_finite(name: str, array: np.ndarray[Any, Any]) -> None:
    """Refuse infinities and NaN, those of a value too large for its new type included.

    Raises:
        ExportError: There is one.
    """
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise ExportError(
            f"The weight {name!r} is not finite as {array.dtype}: it holds NaN or values outside that type's "
            "range. Export with --bits 32, or mend the model."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what tracing says of libraries that are not used and of values that are bound later."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
