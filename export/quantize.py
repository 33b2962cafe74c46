"""Weights in fewer bits: which of them, in which groups, and a report that leaves no tensor out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from export.lower import check_finite
from export.passes import BlockedWeight, is_transposed, linear_weights, parameters
from export.rounding import dequantize, dequantize_packed, num_threads, pack, quantize_matrix
from export.weights import WeightFile, raw_bytes

__all__ = [
    "Bits",
    "BitsOf",
    "Form",
    "QuantReport",
    "QuantizedTensor",
    "SkippedTensor",
    "StoredWeights",
    "choose_form",
    "choose_group_size",
    "store_weights",
]

Bits = Literal[4, 8, 16, 32]

# Below this a group's 16-bit scale would be a quarter of its weights' size and more.
_SMALLEST_GROUP = 16

# Parameters in the making: what reads, packs or writes one would keep all but one core waiting.
_AT_ONCE = 2

BitsOf = Callable[[str], tuple[Bits, str]]
"""How many bits a linear's weight takes, by its name; and why they are 16 or 32 where they are."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a parameter is stored."""

    bits: Bits
    group_size: int
    """Weights that share a scale; 0 where there are no scales."""
    reason: str
    """Of its bits, where they are 16 or 32."""

    def num_bytes(self, size: int) -> int:
        """Of so many weights, scales included."""
        scales = size // self.group_size if self.group_size else 0
        return -(-size * self.bits // 8) + 2 * scales


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """A weight stored in 4 or 8 bits."""

    name: str
    bits: int
    group_size: int
    bytes: int
    """Of values and scales together."""


@dataclass(frozen=True, kw_only=True)
class SkippedTensor:
    """A parameter stored in 16 or 32 bits."""

    name: str
    bytes: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class QuantReport:
    """What became of each parameter."""

    quantized: tuple[QuantizedTensor, ...]
    skipped: tuple[SkippedTensor, ...]

    @property
    def num_bytes(self) -> int:
        """Of all of them."""
        return sum(item.bytes for item in self.quantized) + sum(item.bytes for item in self.skipped)


@dataclass(frozen=True, kw_only=True)
class StoredWeights(Mapping[str, torch.Tensor]):
    """A graph's parameters as they lie in the weight file, by the names of the torch parameters.

    As a mapping it gives them back to torch: in float32, each read when it is asked for, as torch has them.
    """

    blocked: Mapping[str, BlockedWeight]
    plain: Mapping[str, ir.ExternalTensor]
    transposed: frozenset[str]
    """Those that lie there the other way round than torch has them."""
    report: QuantReport

    def __getitem__(self, name: str) -> torch.Tensor:
        """A parameter with what rounding made of it."""
        if name in self.blocked:
            weight = self.blocked[name]
            scales = _read(weight.scales)
            if weight.values.dtype == ir.DataType.INT4:  # numpy takes long to unpack them
                array = dequantize_packed(raw_bytes(weight.values), scales, weight.group_size * len(scales))
            else:
                array = dequantize(_read(weight.values), scales)
        else:
            array = _read(self.plain[name]).astype(np.float32)
        return torch.from_numpy(array.T if name in self.transposed else array)

    def __contains__(self, name: object) -> bool:
        """Whether it is a parameter; nothing is read to tell."""
        return name in self.blocked or name in self.plain

    def __iter__(self) -> Iterator[str]:
        """All names."""
        return iter((*self.blocked, *self.plain))

    def __len__(self) -> int:
        """Of all names."""
        return len(self.blocked) + len(self.plain)


def store_weights(
    model: ir.Model,
    weights: Mapping[str, torch.Tensor],
    file: WeightFile,
    *,
    bits_of: BitsOf,
    group_size: int = 64,
    importance: Mapping[str, NDArray[np.float64]] | None = None,
    on_tensor: Callable[[], None] = lambda: None,
) -> StoredWeights:
    """Write a graph's parameters, a few of them in memory at a time.

    Args:
        model: A float32 graph; it is read, not changed.
        weights: The parameters, each asked for when its turn comes, by several threads.
        file: Where the parameters go.
        bits_of: Asked about each linear's weight. All others take 32 bits where linears do, and 16 elsewhere.
        group_size: Most weights along the input axis that share a scale.
        importance: By name, how much each input of a linear matters; rounding is the more careful with it.
        on_tensor: Called after each parameter.

    Raises:
        ExportError: A weight is not finite, or not within the range of float16.
    """
    linears = {value.name for value in linear_weights(model)}

    def make(item: tuple[str, ir.Value]) -> _Made:
        name, value = item
        array = _as_numpy(weights[name])
        array = array.T if is_transposed(value) else array
        form = choose_form(name, array.shape, bits_of, group_size, linear=name in linears)
        return _make(name, array, form, (importance or {}).get(name))

    blocked: dict[str, BlockedWeight] = {}
    plain: dict[str, ir.ExternalTensor] = {}
    quantized, skipped = [], []
    found = parameters(model)
    for name, made in zip(found, _in_order(make, found.items()), strict=True):
        values, form = file.store(name, made.values), made.form
        if made.scales is None:
            plain[name] = values
            skipped.append(SkippedTensor(name=name, bytes=values.nbytes, reason=form.reason))
        else:
            scales = file.store(f"{name}.scale", made.scales)
            blocked[name] = BlockedWeight(values=values, scales=scales, group_size=form.group_size)
            size = values.nbytes + scales.nbytes
            quantized.append(
                QuantizedTensor(name=name, bits=form.bits, group_size=form.group_size, bytes=size)
            )
        on_tensor()
    return StoredWeights(
        blocked=blocked,
        plain=plain,
        transposed=frozenset(name for name, value in found.items() if is_transposed(value)),
        report=QuantReport(quantized=tuple(quantized), skipped=tuple(skipped)),
    )


def choose_form(name: str, shape: Sequence[int], bits_of: BitsOf, group_size: int, *, linear: bool) -> Form:
    """Choose how a parameter is stored.

    Args:
        name: Of the parameter.
        shape: A linear's is [inputs, outputs].
        bits_of: See `store_weights`, as for `group_size`.
        linear: Whether it is the weight of a linear.
    """
    bits, reason = bits_of(name)
    if not linear:
        return Form(bits=32 if bits == 32 else 16, group_size=0, reason="not the weight of a linear")
    if bits >= 16:
        return Form(bits=bits, group_size=0, reason=reason)
    if (group := choose_group_size(shape[0], group_size)) < _SMALLEST_GROUP:
        reason = f"its {shape[0]} inputs divide into groups of {group}, where {_SMALLEST_GROUP} is the least"
        return Form(bits=16, group_size=0, reason=reason)
    return Form(bits=bits, group_size=group, reason=reason)


def choose_group_size(size: int, limit: int) -> int:
    """Return the largest divisor of `size` that is not above `limit`."""
    return next(group for group in range(min(size, limit), 0, -1) if size % group == 0)


@dataclass(frozen=True, kw_only=True)
class _Made:
    """A parameter as it is going to be stored."""

    values: ir.Tensor[Any] | ir.PackedTensor[Any]
    scales: ir.Tensor[Any] | None
    """None where each value stands for itself."""
    form: Form


def _make(name: str, array: NDArray[Any], form: Form, importance: NDArray[np.float64] | None) -> _Made:
    if form.bits == 4 or form.bits == 8:
        threads = -(-num_threads() // _AT_ONCE)
        rounded = quantize_matrix(
            array, bits=form.bits, group_size=form.group_size, importance=importance, threads=threads
        )
        check_finite(f"{name}.scale", rounded.scales)
        scales = ir.Tensor(rounded.scales, name=f"{name}.scale")
        return _Made(values=_typed(rounded.values, name), scales=scales, form=form)
    if np.issubdtype(array.dtype, np.floating) or array.dtype == ml_dtypes.bfloat16:
        with np.errstate(over="ignore"):
            array = array.astype(np.float32 if form.bits == 32 else np.float16, copy=False)
        check_finite(name, array)
    return _Made(values=ir.Tensor(np.ascontiguousarray(array), name=name), scales=None, form=form)


def _in_order(
    make: Callable[[tuple[str, ir.Value]], _Made], items: Iterable[tuple[str, ir.Value]]
) -> Iterator[_Made]:
    """What is made of each, and meanwhile that of the next few."""
    waiting: deque[Future[_Made]] = deque()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > _AT_ONCE:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _as_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """Without a copy, whatever the type."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: NDArray[Any] = tensor.numpy()
    return array


def _typed(values: NDArray[Any], name: str) -> ir.Tensor[Any] | ir.PackedTensor[Any]:
    if values.dtype == np.int8:
        return ir.Tensor(values, name=name)
    return ir.PackedTensor(pack(values), ir.DataType.INT4, shape=ir.Shape(values.shape), name=name)


def _read(tensor: ir.TensorProtocol) -> NDArray[Any]:
    array = np.array(tensor.numpy())
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()  # it keeps the whole file mapped
    return array
