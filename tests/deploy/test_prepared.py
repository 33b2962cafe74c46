"""Large graphs are kept as the processor wants them: the same results, written once, and never in the way."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from deploy import prepared, session
from deploy.bundle import open_bundle
from deploy.errors import DeployError
from deploy.prepared import WEIGHTS, cache_directory, prepared_graph
from deploy.session import open_graph

MakeBundle = Callable[..., Path]

GRAPH = "transformer/model.onnx"
INPUTS, OUTPUTS, GROUP = 128, 64, 64


def write_int4_graph(bundle: Path) -> None:
    """Y = X W, the weight in 4 bits, in place of the bundle's transformer."""
    generator = np.random.default_rng(0)
    packed = generator.integers(0, 256, INPUTS * OUTPUTS // 2, np.uint8)
    scales = generator.random((INPUTS // GROUP, OUTPUTS), np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["w", "scales"], ["full"], axis=0, block_size=GROUP),
            helper.make_node("MatMul", ["x", "full"], ["y"]),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", OUTPUTS])],
        [
            helper.make_tensor("w", TensorProto.INT4, [INPUTS, OUTPUTS], packed.tobytes(), raw=True),
            helper.make_tensor("scales", TensorProto.FLOAT, scales.shape, scales.tobytes(), raw=True),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path = bundle / GRAPH
    onnx.save(model, str(path), save_as_external_data=True, location=WEIGHTS, size_threshold=0)


class Case(NamedTuple):
    """A graph, and all else `prepared_graph` is told."""

    graph: Path
    facts: dict[str, str]
    cache: Path


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path / "model.onnx", {"weights": "1"}, tmp_path / "cache")


def write(path: Path) -> None:
    path.write_text("prepared")


def prepare(case: Case, writer: Callable[[Path], None] = write, num_bytes: int = 1) -> Path | None:
    return prepared_graph(case.graph, case.facts, num_bytes, writer, case.cache)


def forbidden(path: Path) -> None:
    raise AssertionError(f"{path} is written again")


def test_a_prepared_graph_computes_what_the_graph_does(
    make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "MINIMUM_BYTES", 0)
    bundle = open_bundle(make_bundle(write_int4_graph))
    x = {"x": np.random.default_rng(1).standard_normal((3, INPUTS), np.float32)}
    expected = open_graph(bundle, GRAPH).run(x)["y"]
    cache = tmp_path / "cache"
    for _ in range(2):
        found = open_graph(bundle, GRAPH, cache=cache)
        np.testing.assert_array_equal(found.run(x)["y"], expected)
        assert found.path.is_relative_to(cache)
    (entry,) = (cache / "prepared").iterdir()
    nodes = onnx.load(entry / "model.onnx", load_external_data=False).graph.node
    assert [node.op_type for node in nodes] == ["MatMulNBits"]
    # Both forms of the weights are there.
    assert (entry / WEIGHTS).stat().st_size >= INPUTS * OUTPUTS


def test_a_small_graph_is_opened_as_it_is(make_bundle: MakeBundle, tmp_path: Path) -> None:
    bundle = open_bundle(make_bundle(write_int4_graph))
    assert open_graph(bundle, GRAPH, cache=tmp_path / "cache").path == bundle.path / GRAPH
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("changed", ["processor", "onnxruntime", "weights"])
def test_what_the_form_depends_on_is_told_apart(
    make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    monkeypatch.setattr(session, "MINIMUM_BYTES", 0)
    bundle = open_bundle(make_bundle(write_int4_graph))
    first = open_graph(bundle, GRAPH, cache=tmp_path).path
    if changed == "processor":
        monkeypatch.setattr(session, "processor", lambda: "flags: another")
    elif changed == "onnxruntime":
        monkeypatch.setattr(onnxruntime, "__version__", "0.0.1")
    else:
        file = bundle.manifest.files[f"transformer/{WEIGHTS}"]
        bundle.manifest.files[f"transformer/{WEIGHTS}"] = type(file)(sha256="0" * 64, bytes=file.bytes)
    assert open_graph(bundle, GRAPH, cache=tmp_path).path != first


def test_a_graph_that_cannot_be_loaded_leaves_nothing(
    make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "MINIMUM_BYTES", 0)
    bundle = open_bundle(make_bundle(write_int4_graph))
    (bundle.path / GRAPH).write_bytes(b"no graph")
    with pytest.raises(DeployError, match="onnxruntime cannot load"):
        open_graph(bundle, GRAPH, cache=tmp_path / "cache")
    assert list((tmp_path / "cache" / "prepared").iterdir()) == []


def test_a_prepared_graph_that_was_damaged_is_made_again(
    make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(session, "MINIMUM_BYTES", 0)
    bundle = open_bundle(make_bundle(write_int4_graph))
    prepared_path = open_graph(bundle, GRAPH, cache=tmp_path).path
    weights = prepared_path.with_name(WEIGHTS)
    weights.write_bytes(weights.read_bytes()[:1000])
    assert open_graph(bundle, GRAPH, cache=tmp_path).path == bundle.path / GRAPH
    assert "it is removed and made again the next time" in caplog.text
    assert open_graph(bundle, GRAPH, cache=tmp_path).path == prepared_path


def test_it_is_written_once(case: Case) -> None:
    first = prepare(case)
    assert first is not None
    assert first.read_text() == "prepared"
    assert prepare(case, forbidden) == first


def test_a_disk_without_room_is_said_and_nothing_is_written(
    case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    assert prepare(case, forbidden, num_bytes=shutil.disk_usage(case.graph.parent).total) is None
    assert "nothing can be kept in" in caplog.text
    assert "may be needed, and" in caplog.text


@pytest.mark.parametrize("fault", ["a file in its place", "a full disk"])
def test_a_cache_that_cannot_be_written_is_said(
    case: Case, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    def fill(path: Path) -> None:
        path.write_text("begun")
        Path("/dev/full").write_text("no room")

    if fault == "a file in its place":
        case.cache.write_text("a file")
        assert prepare(case) is None
    else:
        assert prepare(case, fill) is None
        assert list((case.cache / "prepared").iterdir()) == []
    (said,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
    assert "nothing can be kept in" in said.getMessage()


def test_the_faster_of_two_processes_wins(case: Case) -> None:
    def meanwhile(path: Path) -> None:
        write(path)
        prepare(case)

    found = prepare(case, meanwhile)
    assert found is not None
    assert [path.name for path in (case.cache / "prepared").iterdir()] == [found.parent.name]


def test_what_is_not_used_any_more_goes(case: Case) -> None:
    directory = case.cache / "prepared"
    ages = {"used": 29 * 24 * 3600, "unused": 31 * 24 * 3600, ".begun": 60, ".killed": 7 * 3600}
    for name, age in ages.items():
        (directory / name).mkdir(parents=True)
        os.utime(directory / name, (time.time() - age,) * 2)
    found = prepare(case)
    assert found is not None
    assert {path.name for path in directory.iterdir()} == {"used", ".begun", found.parent.name}
    os.utime(found.parent, (0, 0))
    prepare(case, forbidden)
    assert time.time() - found.parent.stat().st_mtime < 60


def test_the_directory_is_the_users_own_unless_it_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HPTOOL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "hptool"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "hptool"
    monkeypatch.setenv("HPTOOL_CACHE", str(tmp_path / "elsewhere"))
    assert cache_directory() == tmp_path / "elsewhere"


def test_a_processor_is_known_by_its_instructions() -> None:
    assert prepared.processor() == prepared.processor()
    assert len(prepared.processor().split()) > 1
