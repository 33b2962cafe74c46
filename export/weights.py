"""The one file of a component's weights, written tensor by tensor while graphs only point into it."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["ALIGNMENT", "WEIGHTS", "WeightFile", "raw_bytes"]

WEIGHTS = "weights.data"

ALIGNMENT = 64  # a cache line, and what vector loads from a mapped file ask for


class WeightFile:
    """Writes `weights.data` in a directory.

    Graphs that are given the same returned tensor share its bytes.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / WEIGHTS
        self._stream = self._path.open("xb")
        self._size = 0

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def store(self, name: str, tensor: ir.Tensor[Any] | ir.PackedTensor[Any]) -> ir.ExternalTensor:
        """Append a tensor and return where it lies; it can be read once the file is closed."""
        offset = -(-self._size // ALIGNMENT) * ALIGNMENT
        self._stream.write(b"\0" * (offset - self._size))
        self._stream.write(np.ascontiguousarray(tensor.raw).reshape(-1).view(np.uint8).data)
        self._size = offset + tensor.nbytes
        assert isinstance(tensor.shape, ir.Shape)
        return ir.ExternalTensor(
            WEIGHTS,
            offset,
            tensor.nbytes,
            tensor.dtype,
            shape=tensor.shape,
            name=name,
            base_dir=self._path.parent,
        )


def raw_bytes(tensor: ir.TensorProtocol) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of a tensor as stored, mapped where they lie in a file: only those looked at are read."""
    if isinstance(tensor, ir.ExternalTensor):
        options: dict[str, Any] = {"offset": tensor.offset or 0, "shape": (tensor.nbytes,)}
        return np.memmap(tensor.path, np.uint8, mode="r", **options)
    return np.frombuffer(tensor.tobytes(), np.uint8)
