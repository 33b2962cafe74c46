"""Weights of 4 bits are recognised in an engine by their bytes, and only where they lie as they are."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from deploy.engine import EngineRequest, build_engine
from export import packed
from export.packed import count_found, int4_weights

ROWS, COLUMNS = 128, 66


def pack(values: np.ndarray) -> bytes:
    flat = values.reshape(-1)
    return bytes(flat[0::2] | flat[1::2] << 4)


def draw(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 16, (ROWS, COLUMNS), np.uint8)


def weight(values: np.ndarray) -> ir.TensorProtocol:
    return ir.PackedTensor(
        np.frombuffer(pack(values), np.uint8), ir.DataType.INT4, shape=ir.Shape(values.shape), name="w"
    )


def engine(path: Path, *parts: bytes) -> Path:
    """Parts among other bytes, at multiples of four."""
    noise = np.random.default_rng(9)
    with path.open("wb") as stream:
        for part in parts:
            stream.write(noise.bytes(4 * 33))
            stream.write(part)
        stream.write(noise.bytes(7))
    return path


@pytest.mark.parametrize("chunk", [1 << 24, 100])
def test_weights_are_found_transposed_and_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(packed, "_CHUNK", chunk)
    values = [draw(seed) for seed in range(4)]
    path = engine(tmp_path / "engine", pack(values[0].T), pack(values[1]), pack(values[2].T))
    assert count_found(path, [weight(value) for value in values]) == 3
    assert count_found(path, [weight(values[3])]) == 0
    assert count_found(path, []) == 0


def test_a_weight_that_was_expanded_is_not_found(tmp_path: Path) -> None:
    values = draw(0)
    path = engine(tmp_path / "engine", values.T.astype(np.float16).tobytes(), values.T.tobytes())
    assert count_found(path, [weight(values)]) == 0


@pytest.mark.parametrize("place", [0, ROWS * COLUMNS // 4 + 3])
def test_a_weight_that_differs_at_the_start_or_in_the_middle_is_not_found(tmp_path: Path, place: int) -> None:
    values = draw(0)
    data = bytearray(pack(values.T))
    data[place] ^= 1
    assert count_found(engine(tmp_path / "engine", bytes(data)), [weight(values)]) == 0


def test_weights_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    first, second = draw(0), draw(1)
    second[:, :1] = first[:, :1]
    path = engine(tmp_path / "engine", pack(first.T), pack(second.T))
    assert count_found(path, [weight(first), weight(second)]) == 2
    assert count_found(engine(path, pack(second.T)), [weight(first), weight(second)]) == 1


def test_a_weight_that_begins_with_zeros_is_found_among_zeros(tmp_path: Path) -> None:
    values = draw(0)
    values[:100, 0] = 0
    path = engine(tmp_path / "engine", bytes(100_000), pack(values.T), bytes(100_000))
    assert count_found(path, [weight(values)]) == 1


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the extra `rtx`")
def test_the_builder_lays_weights_down_in_this_way(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 16, (128, 64), np.uint8)
    kind, tokens = ir.DataType.FLOAT16, ["batch", "tokens"]
    w, scales = weight(values), ir.tensor(np.ones((2, 64), np.float16), name="scales")
    stored = [ir.val(item.name, const_value=item) for item in (w, scales)]
    text = ir.val("encoder_hidden_states", kind, [*tokens, 128])
    full = ir.node("DequantizeLinear", stored, {"axis": 0, "block_size": 64})
    product = ir.val("y", kind, [*tokens, 64])
    nodes = [full, ir.node("MatMul", [text, full.outputs[0]], outputs=[product])]
    graph = ir.Graph([text], [product], nodes=nodes, initializers=stored, opset_imports={"": 21}, name="g")
    model = ir.Model(graph, ir_version=10)
    ir.save(model, tmp_path / "model.onnx", external_data="weights.data")
    request = EngineRequest(
        runtime="tensorrt-rtx",
        graph=str(tmp_path / "model.onnx"),
        compute_capabilities=("8.6", "8.9"),
        latent_sizes=((8, 8),),
        num_tokens=16,
        batches=(1, 2, 2),
    )
    build_engine(request, tmp_path / "transformer.engine")
    (found,) = int4_weights(ir.load(tmp_path / "model.onnx"))
    assert count_found(tmp_path / "transformer.engine", [found]) == 1
