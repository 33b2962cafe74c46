"""Graphs without weights, kept by what they were traced from: a trace takes seconds and hangs on no weight.

The name of an entry is a digest of the module's structure, of the shapes it is traced at, of the tools and of
this code. Delete the directory whenever you like.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import logging
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache as once
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from filelock import FileLock
from google.protobuf.message import DecodeError
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim

from deploy.kept import cache_directory, key_of
from export.passes import as_inputs, is_transposed, set_transposed

__all__ = ["kept_trace", "structure", "versions"]

logger = logging.getLogger(__name__)

_TOOLS = ("torch", "diffusers", "transformers", "onnx-ir", "onnxscript", "onnxruntime", "numpy")
_WEIGHTS = "hptool.weights"
_PLAIN = (bool, int, float, str, bytes, type(None), types.EllipsisType, torch.dtype, torch.device)
_PLACES = {"_name_or_path", "name_or_path", "_commit_hash"}
"""Of a configuration: where it came from, which makes no difference."""
_PATIENCE = 120.0
"""Seconds another process is waited for: one that was forked beside threads can hang."""


def kept_trace(facts: Any, make: Callable[[], ir.Model]) -> ir.Model:
    """Return a graph whose weights have no values, traced now if nothing like it was before.

    What another process is tracing at this moment is waited for.

    Args:
        facts: All that it hangs on beside tools and code, of what `structure` can tell.
        make: Traces it.
    """
    try:
        key = key_of({"facts": structure(facts), "versions": versions()})
    except TypeError as error:
        logger.warning("What is traced now cannot be kept: %s", error)
        return make()
    path = cache_directory() / "traces" / f"{key}.onnx"
    with _alone_at(path):
        try:
            if path.exists():
                return _with_weights(ir.load(path))
        except (DecodeError, KeyError, ValueError) as error:
            logger.warning("%s is damaged and made anew (%s)", path, error)
        model = make()
        try:
            with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as beside:
                written = Path(beside) / path.name
                ir.save(_without_weights(model), written)
                written.replace(path)
        except OSError as error:
            logger.warning("What was traced cannot be kept in %s, and will be again: %s", path.parent, error)
            return model
    return _with_weights(ir.load(path))


@contextmanager
def _alone_at(path: Path) -> Iterator[None]:
    """Wait for another process at the same trace; where it hangs or no lock is to be had, say so and go on.

    Two at one trace only take longer than one.
    """
    lock = FileLock(path.with_suffix(".lock"), timeout=_PATIENCE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        logger.warning("%s may be traced by two processes at once: %s", path, error)
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):
                Path(lock.lock_file).unlink()
            lock.release()


def _without_weights(model: ir.Model) -> ir.Model:
    weights = {
        name: is_transposed(value)
        for name, value in model.graph.initializers.items()
        if value.const_value is None
    }
    copy = as_inputs(model, weights)
    copy.metadata_props[_WEIGHTS] = json.dumps(weights)
    return copy


def _with_weights(model: ir.Model) -> ir.Model:
    inputs = {value.name: value for value in model.graph.inputs}
    for name, transposed in json.loads(model.metadata_props.pop(_WEIGHTS)).items():
        model.graph.inputs.remove(inputs[name])
        model.graph.initializers.add(inputs[name])
        set_transposed(inputs[name], transposed=transposed)
    return model


@once
def versions() -> dict[str, Any]:
    """What graphs hang on beside the model: the tools, and the code that makes them."""
    digest = hashlib.sha256()
    for package in ("export", "toolchain.families"):
        for path in sorted(resources.files(package).iterdir(), key=lambda path: path.name):
            if path.name.endswith(".py"):
                digest.update(path.read_bytes())
    tools = {name: importlib.metadata.version(name) for name in _TOOLS}
    return {"tools": tools, "code": digest.hexdigest()}


def structure(item: Any) -> str:
    """All of a module, or of other data, that a trace can depend on: everything but the weights' values.

    Classes and functions are told by their names and the digests of their files.

    Raises:
        TypeError: It holds something of which it cannot be said what it is.
    """
    return json.dumps(_describe(item, {}))


def _describe(item: Any, seen: dict[int, tuple[int, Any]]) -> Any:
    if isinstance(item, _PLAIN):
        return repr(item)
    if isinstance(item, (type, types.BuiltinFunctionType)):
        return [item.__module__, item.__qualname__, _source(item)]
    if id(item) in seen:  # tied weights, and what holds itself
        return seen[id(item)][0]
    seen[id(item)] = len(seen), item  # held, so that its id stays its own
    tell = partial(_describe, seen=seen)
    if isinstance(item, torch.Tensor):
        if not (isinstance(item, FakeTensor) or item.is_meta):
            raise TypeError(f"it holds a {type(item).__name__} with values")
        return [isinstance(item, nn.Parameter), repr(item.dtype), list(map(str, item.shape))]
    if isinstance(item, Dim):
        return [item.__name__, str(item.min), str(item.max)]
    if isinstance(item, dict):
        return [[tell(key), tell(value)] for key, value in item.items() if key not in _PLACES]
    if isinstance(item, (list, tuple)):
        return [tell(value) for value in item]
    if isinstance(item, (set, frozenset)):
        return sorted(json.dumps(tell(value)) for value in item)
    if isinstance(item, types.FunctionType):
        bound = [cell.cell_contents for cell in item.__closure__ or ()]
        return [
            item.__module__,
            item.__qualname__,
            _source(item),
            tell([item.__defaults__, item.__kwdefaults__, bound]),
        ]
    if isinstance(item, types.MethodType):
        return tell([item.__func__, item.__self__])
    if isinstance(item, partial):
        return tell([item.func, item.args, item.keywords])
    if not hasattr(item, "__dict__"):
        raise TypeError(f"it holds a {type(item).__name__}")
    return tell([type(item), vars(item)])


def _source(item: Any) -> str | None:
    """Digest of the file that a class or function is in; None if it is not Python's."""
    try:
        return _digest(inspect.getfile(item))
    except TypeError:
        return None


@once
def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
