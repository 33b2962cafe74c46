"""Weights in fewer bits: which of them, in which groups, and a report that leaves no tensor out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from export.lower import check_finite
from export.passes import BlockedWeight, is_transposed, linear_weights, parameters
from export.rounding import dequantize, pack, quantize_matrix
from export.weights import WeightFile

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
            array = dequantize(_read(weight.values), _read(weight.scales))
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
    """Write a graph's parameters, one at a time.

    Args:
        model: A float32 graph; it is read, not changed.
        weights: The parameters, each asked for when its turn comes.
        file: Where the parameters go.
        bits_of: Asked about each linear's weight. All others take 32 bits where linears do, and 16 elsewhere.
        group_size: Most weights along the input axis that share a scale.
        importance: By name, how much each input of a linear matters; rounding is the more careful with it.
        on_tensor: Called after each parameter.

    Raises:
        ExportError: A weight is not finite, or not within the range of float16.
    """
    linears = {value.name for value in linear_weights(model)}
    blocked: dict[str, BlockedWeight] = {}
    plain: dict[str, ir.ExternalTensor] = {}
    transposed = set()
    quantized, skipped = [], []
    for name, value in parameters(model).items():
        array = _as_numpy(weights[name])
        array = array.T if is_transposed(value) else array
        form = choose_form(name, array.shape, bits_of, group_size, linear=name in linears)
        if form.bits == 4 or form.bits == 8:
            rounded = quantize_matrix(
                array, bits=form.bits, group_size=form.group_size, importance=(importance or {}).get(name)
            )
            check_finite(f"{name}.scale", rounded.scales)
            values = _typed(rounded.values, name)
            blocked[name] = BlockedWeight(
                values=file.store(name, values),
                scales=file.store(f"{name}.scale", ir.Tensor(rounded.scales, name=f"{name}.scale")),
                group_size=form.group_size,
            )
            size = values.nbytes + rounded.scales.nbytes
            quantized.append(
                QuantizedTensor(name=name, bits=form.bits, group_size=form.group_size, bytes=size)
            )
        else:
            if np.issubdtype(array.dtype, np.floating) or array.dtype == ml_dtypes.bfloat16:
                with np.errstate(over="ignore"):
                    array = array.astype(np.float32 if form.bits == 32 else np.float16, copy=False)
                check_finite(name, array)
            array = np.ascontiguousarray(array)
            plain[name] = file.store(name, ir.Tensor(array, name=name))
            skipped.append(SkippedTensor(name=name, bytes=array.nbytes, reason=form.reason))
        if is_transposed(value):
            transposed.add(name)
        on_tensor()
    return StoredWeights(
        blocked=blocked,
        plain=plain,
        transposed=frozenset(transposed),
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
