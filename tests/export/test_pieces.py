"""A graph gives the same in pieces as whole, and no piece has more weights than was asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from export import pieces
from export.pieces import run_in_pieces

WEIGHT_BYTES = 4 * 2 * 2
# A residual stream through three weights: a node turns one of them first, and one is used twice. At the end a
# size of the input is needed; the second result branches off in the middle.
GRAPH = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 2] x) => (float[n, 2] y, float[n, 2] early)
<float[2, 2] a = {0.5, -1, 2, 0.25}, float[2, 2] b = {1, 1, -0.5, 2}, float[2, 2] c = {0.1, 0.2, 0.3, -0.4},
 int64[2] count, float[n, 2] one, float[n, 2] two, float[n, 2] three, float[n, 2] four, float[n, 2] five,
 float[n, 2] six, float[n, 2] seven>
{ count = Shape(x)
  turned = Transpose(a)
  one = MatMul(x, turned)
  two = Add(one, x)
  early = Relu(two)
  three = MatMul(two, b)
  four = Add(three, two)
  five = MatMul(four, c)
  six = MatMul(five, b)
  seven = Add(six, four)
  y = Reshape(seven, count) }
"""


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    ir.save(ir.from_onnx_text(GRAPH), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("most_weights", [0, 1, 2, 9])
def test_a_graph_gives_the_same_in_pieces(
    graph: Path, most_weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []

    def spy(path: Path) -> onnxruntime.InferenceSession:
        tensors = [value.const_value for value in ir.load(path).graph.initializers.values()]
        opened.append(sum(tensor.nbytes for tensor in tensors if tensor is not None))
        return whole(path)

    whole = pieces.parity_session
    monkeypatch.setattr(pieces, "parity_session", spy)
    feeds = [{"x": np.random.default_rng(n).standard_normal((n, 2), np.float32)} for n in (1, 3)]
    found = run_in_pieces(graph, feeds, ["early", "y"], most_bytes=most_weights * WEIGHT_BYTES)
    assert max(opened) <= max(most_weights, 1) * WEIGHT_BYTES
    assert len(opened) == {0: 8, 1: 4, 2: 2, 9: 1}[most_weights]
    session = whole(graph)
    for feed, outputs in zip(feeds, found, strict=True):
        for output, expected in zip(outputs, session.run(["early", "y"], feed), strict=True):
            np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


def test_nothing_is_left_beside_the_graph(graph: Path) -> None:
    run_in_pieces(graph, [{"x": np.zeros((1, 2), np.float32)}], ["y"], most_bytes=0)
    assert [path.name for path in graph.parent.iterdir()] == ["model.onnx"]
