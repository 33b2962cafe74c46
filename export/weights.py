"""The one file of a component's weights, written tensor by tensor while graphs only point into it."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["ALIGNMENT", "WEIGHTS", "WeightFile"]

WEIGHTS = "weights.data"

ALIGNMENT = 64  # a cache line, and what vector loads from a mapped file ask for

# Tensors that wait to be written: values and scales of one matrix, while the next is made.
_WAITING = 2


class WeightFile:
    """Writes `weights.data` in a directory: one tensor while the next is made.

    Graphs that are given the same returned tensor share its bytes.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / WEIGHTS
        self._stream = self._path.open("xb")
        self._size = 0
        self._writer = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stream, self._writer:
            while error is None and self._waiting:
                self._waiting.popleft().result()

    def store(self, name: str, tensor: ir.Tensor[Any] | ir.PackedTensor[Any]) -> ir.ExternalTensor:
        """Append a tensor and return where it lies; it can be read once the file is closed.

        Raises:
            OSError: One before it could not be written.
        """
        offset = -(-self._size // ALIGNMENT) * ALIGNMENT
        padding, self._size = offset - self._size, offset + tensor.nbytes
        while len(self._waiting) >= _WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._writer.submit(self._write, padding, tensor))
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

    def _write(self, padding: int, tensor: ir.Tensor[Any] | ir.PackedTensor[Any]) -> None:
        self._stream.write(b"\0" * padding)
        self._stream.write(np.ascontiguousarray(tensor.raw).reshape(-1).view(np.uint8).data)
