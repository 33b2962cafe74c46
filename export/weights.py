"""The one file of a component's weights, written tensor by tensor while graphs only point into it."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import onnx_ir as ir

__all__ = ["ALIGNMENT", "WEIGHTS", "WeightFile"]

WEIGHTS = "weights.data"

ALIGNMENT = 64  # a cache line, and what vector loads from a mapped file ask for


class WeightFile:
    """Writes `weights.data` in a directory, holding one tensor at a time in memory.

    Graphs that are given the same returned tensor share its bytes.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / WEIGHTS
        self._stream = self._path.open("xb")

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def store(self, name: str, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        """Append a tensor and return where it lies; it can be read once the file is closed."""
        data = tensor.tobytes()
        offset = -(-self._stream.tell() // ALIGNMENT) * ALIGNMENT
        self._stream.write(b"\0" * (offset - self._stream.tell()))
        self._stream.write(data)
        assert isinstance(tensor.shape, ir.Shape)
        return ir.ExternalTensor(
            WEIGHTS,
            offset,
            len(data),
            tensor.dtype,
            shape=tensor.shape,
            name=name,
            base_dir=self._path.parent,
        )
