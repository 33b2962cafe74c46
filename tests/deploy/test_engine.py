"""Engines are built in a process of their own, kept by what they were made of, and refused clearly."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from deploy import engine
from deploy.bundle import Shapes, open_bundle
from deploy.engine import EngineRequest, build_engine, engine_key, engine_request, kept_engine
from deploy.errors import DeployError
from deploy.gpu import Gpu, Gpus

MakeBundle = Callable[..., Path]

INPUTS, OUTPUTS, GROUP = 128, 64, 64
DIGESTS = {"model.onnx": "1", "weights.data": "2"}

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the extra `rtx`"
)


@pytest.fixture
def request_(tmp_path: Path) -> EngineRequest:
    """One linear in 4 bits, on the text."""
    generator = np.random.default_rng(0)
    packed = generator.integers(0, 256, INPUTS * OUTPUTS // 2, np.uint8)
    scales = generator.random((INPUTS // GROUP, OUTPUTS)).astype(np.float16)
    text = "encoder_hidden_states"
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["w", "scales"], ["full"], axis=0, block_size=GROUP),
            helper.make_node("MatMul", [text, "full"], ["y"]),
        ],
        "graph",
        [helper.make_tensor_value_info(text, TensorProto.FLOAT16, ["batch", "tokens", INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["batch", "tokens", OUTPUTS])],
        [
            helper.make_tensor("w", TensorProto.INT4, [INPUTS, OUTPUTS], packed.tobytes(), raw=True),
            helper.make_tensor("scales", TensorProto.FLOAT16, scales.shape, scales.tobytes(), raw=True),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path = tmp_path / "graph" / "model.onnx"
    path.parent.mkdir()
    onnx.save(model, str(path), save_as_external_data=True, location="weights.data", size_threshold=0)
    return EngineRequest(
        runtime="tensorrt-rtx",
        graph=str(path),
        compute_capabilities=("8.9",),
        latent_sizes=((8, 8),),
        num_tokens=16,
        batches=(1, 2, 4),
    )


def as_tensorrt(request: EngineRequest) -> EngineRequest:
    return dataclasses.replace(request, runtime="tensorrt", compute_capabilities=())


@needs_rtx
def test_an_engine_is_built_with_4_bit_weights(request_: EngineRequest, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    path = tmp_path / "engines" / "transformer.engine"
    built = build_engine(request_, path, lambda done, total: steps.append((done, total)))
    assert (built.bytes, built.num_int4) == (path.stat().st_size, 1)
    assert built.builder.startswith("tensorrt-rtx 1.")
    assert steps == [(done, 100) for done in range(1, 101)]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.usefixtures("tensorrt")
def test_tensorrt_is_driven_as_tensorrt_rtx_is(request_: EngineRequest, tmp_path: Path) -> None:
    built = build_engine(as_tensorrt(request_), tmp_path / "transformer.engine")
    assert (built.num_int4, built.builder) == (1, "tensorrt 10.16.0")


@needs_rtx
def test_a_directory_named_as_ours_is_not_mistaken_for_it(
    request_: EngineRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "__init__.py").write_text("raise SystemExit('another deploy')")
    monkeypatch.chdir(tmp_path)
    assert build_engine(request_, tmp_path / "transformer.engine").num_int4 == 1


@needs_rtx
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compute_capabilities": ("9.0",)}, r"for compute capability 9\.0: .*9\.0 .* not supported by this"),
        ({"num_tokens": 0}, "encoder_hidden_states has a dimension of no known size"),
        ({"batches": (2, 1, 1)}, "could not build an engine of model.onnx for compute capability 8.9: "),
    ],
)
def test_what_the_builder_refuses_is_one_clear_error(
    request_: EngineRequest, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(DeployError, match=message):
        build_engine(dataclasses.replace(request_, **changes), tmp_path / "engine")
    assert [path.name for path in tmp_path.iterdir()] == ["graph"]


@needs_rtx
def test_a_damaged_graph_is_one_clear_error(request_: EngineRequest, tmp_path: Path) -> None:
    Path(request_.graph).write_bytes(b"no graph")
    with pytest.raises(DeployError, match=r"model\.onnx for compute capability 8\.9: .*parse"):
        build_engine(request_, tmp_path / "engine")


def test_a_missing_runtime_says_how_to_install_it(
    request_: EngineRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(DeployError, match=r"needs tensorrt, .*pip install 'hptool\[tensorrt\]'"):
        build_engine(as_tensorrt(request_), tmp_path / "engine")


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in tasks for child in path.read_text().split()]


@needs_rtx
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the process in /proc")
def test_a_builder_that_was_killed_is_named_with_its_likely_reason(
    request_: EngineRequest, tmp_path: Path
) -> None:
    before = set(children(os.getpid()))

    def kill(*_: int) -> None:
        for child in set(children(os.getpid())) - before:
            os.kill(child, signal.SIGKILL)

    with pytest.raises(DeployError, match=r"was killed, most often for lack of memory: it needs about \d"):
        build_engine(request_, tmp_path / "engine", kill)
    assert [path.name for path in tmp_path.iterdir()] == ["graph"]


@needs_rtx
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the process in /proc")
def test_a_builder_ends_with_the_process_that_asked(request_: EngineRequest, tmp_path: Path) -> None:
    code = (
        "import json, sys, time; from pathlib import Path; from profiles.typed import from_data\n"
        "from deploy.engine import EngineRequest, build_engine\n"
        "def wait(*_): print('building', flush=True); time.sleep(60)\n"
        "request = from_data(EngineRequest, json.loads(sys.argv[1]))\n"
        "build_engine(request, Path(sys.argv[2]), wait)"
    )
    job = json.dumps(dataclasses.asdict(request_))
    command = [sys.executable, "-c", code, job, str(tmp_path / "engine")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as asker:
        assert asker.stdout is not None
        assert asker.stdout.readline() == "building\n"
        (builder,) = children(asker.pid)
        asker.kill()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{builder}/cmdline").exists() and time.monotonic() < deadline:
        if b"deploy.engine" not in Path(f"/proc/{builder}/cmdline").read_bytes():
            break  # its number is another's by now, or it waits to be buried
        time.sleep(0.05)
    assert time.monotonic() < deadline


@needs_rtx
def test_an_engine_is_built_once(
    request_: EngineRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, built = kept_engine(request_, DIGESTS, tmp_path)
    monkeypatch.setattr(engine, "build_engine", pytest.fail)
    assert kept_engine(request_, DIGESTS, tmp_path) == (path, built)
    assert path.is_relative_to(tmp_path / "engines")


@needs_rtx
def test_a_damaged_engine_is_built_again(
    request_: EngineRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, _ = kept_engine(request_, DIGESTS, tmp_path)
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    again, built = kept_engine(request_, DIGESTS, tmp_path)
    assert (again, built.bytes) == (path, len(data))
    assert re.search("was damaged and is built again", caplog.text)


def test_a_cache_without_room_is_said(request_: EngineRequest, tmp_path: Path) -> None:
    (tmp_path / "engines").write_text("a file")
    with pytest.raises(DeployError, match=r"cannot be kept in .*set HPTOOL_CACHE"):
        kept_engine(request_, DIGESTS, tmp_path)


@needs_rtx
def test_an_engine_is_known_by_contents_and_options_and_not_by_names(request_: EngineRequest) -> None:
    key = engine_key(request_, DIGESTS)
    moved = dataclasses.replace(request_, graph="elsewhere/another.onnx")
    assert engine_key(moved, {"another.onnx": "1", "another.data": "2"}) == key
    others = [
        engine_key(request_, DIGESTS | {"weights.data": "3"}),
        *(
            engine_key(dataclasses.replace(request_, **change), DIGESTS)
            for change in (
                {"compute_capabilities": ("8.6",)},
                {"latent_sizes": ((8, 16),)},
                {"num_tokens": 17},
                {"batches": (1, 1, 4)},
            )
        ),
    ]
    assert len({key, *others}) == 6


@needs_rtx
def test_another_version_of_the_builder_builds_again(
    request_: EngineRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = engine_key(request_, DIGESTS)
    monkeypatch.setattr(engine.import_tensorrt("tensorrt-rtx"), "__version__", "1.8")
    assert engine_key(request_, DIGESTS) != key


@pytest.mark.usefixtures("tensorrt")
def test_an_engine_of_tensorrt_is_of_one_gpu_and_driver(
    request_: EngineRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(name: str, driver: str) -> str:
        gpu = Gpu(name=name, compute_capability="8.7", memory_bytes=1)
        monkeypatch.setattr(engine, "read_gpus", lambda: Gpus(devices=(gpu,), driver_version=driver))
        return engine_key(as_tensorrt(request_), DIGESTS)

    assert key("Orin", "540.4") == key("Orin", "540.4")
    assert len({key("Orin", "540.4"), key("Orin Nano", "540.4"), key("Orin", "560.1")}) == 3


@pytest.mark.parametrize(("guided", "batches"), [(True, (1, 2, 8)), (False, (1, 1, 4))])
def test_a_request_is_what_the_variant_takes(
    make_bundle: MakeBundle, guided: bool, batches: tuple[int, int, int]
) -> None:
    manifest = open_bundle(make_bundle()).manifest
    variant = dataclasses.replace(
        manifest.variants[0],
        compute_capabilities=["12.0", "8.9"],
        shapes=Shapes(sizes=[(64, 128)], max_batch=4, text_tokens=23),
    )
    architecture = dataclasses.replace(manifest.architecture, classifier_free=guided)
    assert engine_request(Path("model.onnx"), variant, architecture) == EngineRequest(
        runtime="tensorrt-rtx",
        graph="model.onnx",
        compute_capabilities=("8.9", "12.0"),
        latent_sizes=((8, 16),),
        num_tokens=23,
        batches=batches,
    )
    on_device = dataclasses.replace(variant, runtime="tensorrt", compute_capabilities=["8.7"])
    assert engine_request(Path("model.onnx"), on_device, architecture).compute_capabilities == ()
