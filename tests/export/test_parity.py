"""A graph that computes something else than torch does not pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from export.errors import ExportError
from export.parity import Case, check_graph

GRAPH = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[n] x) => (float[n] y) { y = Log(x) }
"""


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    ir.save(ir.from_onnx_text(GRAPH), path)
    return path


def case(x: list[float], y: list[float]) -> Case:
    arrays = {"x": np.array(x, dtype=np.float32), "y": np.array(y, dtype=np.float32)}
    return Case(shape={"batch": len(x)}, inputs={"x": arrays["x"]}, outputs={"y": arrays["y"]})


def test_a_graph_that_agrees_is_reported_with_its_errors(graph: Path) -> None:
    rows = check_graph(
        graph, [case([1.0, np.e], [0.0, 1.0])], stage="decoder", graph="d/model.onnx", weights="float32"
    )
    assert [(row.shape, row.num_non_finite, row.limit) for row in rows] == [({"batch": 2}, 0, 1e-4)]
    assert rows[0].relative_error < 1e-6
    assert rows[0].cosine == pytest.approx(1.0)


def test_too_large_an_error_names_the_stage_the_shape_and_the_number(graph: Path) -> None:
    with pytest.raises(ExportError, match=r"exported decoder .* at batch 2: .* relative error of 0\.5 where"):
        check_graph(
            graph, [case([1.0, np.e], [0.0, 2.0])], stage="decoder", graph="d/model.onnx", weights="int4"
        )


def test_values_that_are_not_finite_do_not_pass(graph: Path) -> None:
    with pytest.raises(ExportError, match="holds 1 values that are not finite"):
        check_graph(
            graph, [case([0.0, np.e], [0.0, 1.0])], stage="decoder", graph="d/model.onnx", weights="int4"
        )
