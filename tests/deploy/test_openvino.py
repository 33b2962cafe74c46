"""OpenVINO runs the graphs of a bundle as onnxruntime does, and is chosen where it is installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from deploy.bundle import Variant, open_bundle
from deploy.choice import choose_variant
from deploy.errors import DeployError
from deploy.openvino_session import OpenvinoSession
from deploy.session import Session
from tests.deploy.conftest import CPU, MakeBundle

pytest.importorskip("openvino")
PC = replace(CPU, runtime="openvino")
GROUP, INPUTS, OUTPUTS = 64, 256, 96


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear in 4 bits and attention in one operator, as exports have them."""
    generator = np.random.default_rng(0)
    values = generator.integers(-7, 8, (INPUTS, OUTPUTS)).astype(np.int8)
    scales = generator.uniform(0.01, 0.02, (INPUTS // GROUP, OUTPUTS)).astype(np.float32)
    model = onnx.parser.parse_model(
        f"""
        <ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        g (float[b, t, {INPUTS}] x) => (float[b, t, {OUTPUTS}] y)
        {{
            w = DequantizeLinear<axis = 0, block_size = {GROUP}>(values, scales)
            h = MatMul(x, w)
            y = com.microsoft.MultiHeadAttention<num_heads = 3>(h, h, h)
        }}
        """
    )
    packed = ((values.reshape(-1)[0::2] & 15) | (values.reshape(-1)[1::2] & 15) << 4).astype(np.uint8)
    model.graph.initializer.append(
        onnx.helper.make_tensor("values", onnx.TensorProto.INT4, values.shape, packed.tobytes(), raw=True)
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(scales, "scales"))
    path = tmp_path_factory.mktemp("graphs") / "model.onnx"
    onnx.save(model, path)
    return path


def drawn(batch: int, tokens: int) -> dict[str, Any]:
    generator = np.random.default_rng(1)
    return {"x": 0.1 * generator.standard_normal((batch, tokens, INPUTS))}  # float64: it is cast


@pytest.mark.parametrize(("batch", "tokens"), [(1, 5), (3, 33)])
def test_it_computes_what_onnxruntime_does(graph: Path, batch: int, tokens: int) -> None:
    session = OpenvinoSession(graph, threads=1)
    (expected,) = Session(graph).run(drawn(batch, tokens)).values()
    (found,) = session.run(drawn(batch, tokens)).values()
    assert found.shape == (batch, tokens, OUTPUTS)
    # It rounds a linear's inputs to 8 bits, or computes in bfloat16.
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


def test_what_it_gave_stays_when_it_runs_again(graph: Path) -> None:
    session = OpenvinoSession(graph)
    (first,) = session.run(drawn(1, 5)).values()
    kept = first.copy()
    session.run({"x": np.ones((1, 5, INPUTS))})
    np.testing.assert_array_equal(first, kept)


def test_wrong_inputs_are_one_clear_error(graph: Path) -> None:
    with pytest.raises(DeployError, match=r"did not run on x \[1, 5, 7\]"):
        OpenvinoSession(graph).run({"x": np.zeros((1, 5, 7))})


def test_a_file_that_is_no_graph_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(DeployError, match="OpenVINO cannot compile"):
        OpenvinoSession(tmp_path / "model.onnx")


def test_it_is_chosen_before_onnxruntime_where_it_is_installed(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(make_bundle(variants=[CPU, PC]))
    assert choose_variant(bundle, None)[0] == PC
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "openvino" else find(name, *rest)
    )
    chosen, reasons = choose_variant(bundle, None)
    assert chosen == CPU
    assert reasons[0].startswith("cpu-x86 (openvino): passed over, openvino is not installed")


@pytest.mark.parametrize(("version", "chosen"), [("2026.1.3", CPU), ("2026.2.0", PC), ("2027.0.0.dev1", PC)])
def test_one_that_misreads_graphs_is_passed_over(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch, version: str, chosen: Variant
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    found, reasons = choose_variant(open_bundle(make_bundle(variants=[CPU, PC])), None)
    assert found == chosen
    assert (f"openvino {version} is older than 2026.2" in reasons[0]) == (chosen == CPU)


def test_it_is_passed_over_where_memory_does_not_suffice_to_compile(make_bundle: MakeBundle) -> None:
    bundle = open_bundle(make_bundle(variants=[CPU, PC]))
    chosen, reasons = choose_variant(bundle, None, available=100)
    assert chosen == CPU
    assert "of memory with OpenVINO, and 100 bytes are available" in reasons[0]
    assert choose_variant(bundle, None, available=1 << 30)[0] == PC


def test_a_runtime_that_is_asked_for_is_taken_or_refused(make_bundle: MakeBundle) -> None:
    bundle = open_bundle(make_bundle(variants=[CPU, PC]))
    assert choose_variant(bundle, None, runtime="onnxruntime-cpu")[0] == CPU
    assert choose_variant(bundle, "cpu-x86", runtime="openvino")[0] == PC
    with pytest.raises(
        DeployError, match="no variant for the runtime 'tensorrt', only for onnxruntime-cpu, openvino"
    ):
        choose_variant(bundle, None, runtime="tensorrt")
