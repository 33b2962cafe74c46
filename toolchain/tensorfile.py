"""Safetensors files written a tensor at a time: what is too large to be in memory at once."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from typing import BinaryIO

import torch

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_header(
    file: BinaryIO,
    tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]],
    metadata: Mapping[str, str],
) -> dict[str, int]:
    """Begin a file, which gets its full length at once.

    Args:
        file: Empty.
        tensors: By name their shapes and types, in the order of the file. Larger types come first, for every
            tensor has to lie at a multiple of its type's size.
        metadata: As safetensors takes it.

    Returns:
        Where in the file each tensor's bytes belong.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    starts, offset = {}, 0
    for name, shape, kind in tensors:
        assert offset % kind.itemsize == 0, name
        end = offset + torch.Size(shape).numel() * kind.itemsize
        header[name] = {"dtype": _NAMES[kind], "shape": shape, "data_offsets": [offset, end]}
        starts[name], offset = offset, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    file.truncate(8 + len(text) + offset)
    return {name: 8 + len(text) + start for name, start in starts.items()}


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor as its bytes lie in such a file."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
