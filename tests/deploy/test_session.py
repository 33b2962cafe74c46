from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from deploy import session
from deploy.bundle import open_bundle
from deploy.engine import EngineRequest
from deploy.errors import DeployError, extra
from deploy.session import EngineSession, Session, open_variant

MakeBundle = Callable[..., Path]

ENGINE = "engines/sm89-01234567.engine"


@pytest.fixture
def halves(tmp_path: Path) -> Path:
    """A float16 graph, doubled = 2 * x, its constant in a file beside it."""
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "two"], ["doubled"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [2])],
        [helper.make_tensor_value_info("doubled", TensorProto.FLOAT16, [2])],
        [
            helper.make_tensor(
                "two", TensorProto.FLOAT16, [2], np.array([2, 2], np.float16).tobytes(), raw=True
            )
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path = tmp_path / "model.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="weights.data", size_threshold=0)
    return path


def test_inputs_take_the_type_of_the_graph(halves: Path) -> None:
    doubled = Session(halves, threads=1).run({"x": np.array([1, 0.5], np.float32)})["doubled"]
    assert (doubled.dtype, doubled.tolist()) == (np.float16, [2.0, 1.0])


def test_graph_without_its_weights_is_refused(halves: Path) -> None:
    (halves.parent / "weights.data").unlink()
    with pytest.raises(DeployError, match=r"onnxruntime cannot load .*model\.onnx"):
        Session(halves)


def test_wrong_inputs_are_named(halves: Path) -> None:
    with pytest.raises(DeployError, match=r"did not run on x \[3\]"):
        Session(halves).run({"x": np.zeros(3, np.float32)})
    with pytest.raises(DeployError, match=r"did not run on y \[2\]"):
        Session(halves).run({"y": np.zeros(2, np.float32)})


def test_no_threads_are_refused(halves: Path) -> None:
    with pytest.raises(DeployError, match="one thread at least, not 0"):
        Session(halves, threads=0)


def test_absent_provider_is_refused(halves: Path) -> None:
    with pytest.raises(DeployError, match=r"has no NoExecutionProvider here, only .*CPUExecutionProvider"):
        Session(halves, providers=("NoExecutionProvider",))


def test_provider_that_does_not_start_is_no_silent_fallback(
    halves: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # onnxruntime lists a provider whose libraries do not load, then leaves it out of the session.
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )

    class WithoutCuda(onnxruntime.InferenceSession):
        def __init__(self, path: Path, options: onnxruntime.SessionOptions, providers: list[str]) -> None:
            super().__init__(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", WithoutCuda)
    with pytest.raises(
        DeployError, match=r"did not start CUDAExecutionProvider .* on CPUExecutionProvider instead"
    ):
        Session(halves, providers=("CUDAExecutionProvider",))


def test_cuda_takes_the_memory_it_is_asked_for_and_finds_libraries_in_packages(
    halves: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    asked: list[Any] = []

    class Cuda(onnxruntime.InferenceSession):
        def __init__(self, path: Path, options: onnxruntime.SessionOptions, providers: list[Any]) -> None:
            asked.append(providers)
            super().__init__(path, options, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return list(wanted)

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(wanted))
    monkeypatch.setattr(onnxruntime, "InferenceSession", Cuda)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: asked.append("preload"))
    Session(halves, providers=wanted, cuda_options={"use_tf32": "0"})
    cuda = {"arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}
    assert asked == ["preload", [("CUDAExecutionProvider", cuda), ("CPUExecutionProvider", {})]]
    asked.clear()
    Session(halves)
    assert asked == [["CPUExecutionProvider"]]


# In processes of their own: Polygraphy settles on one TensorRT when it is first imported.
OPEN_ENGINE = """
import sys
from deploy.errors import DeployError
from deploy.session import EngineSession
for runtime in sys.argv[2:]:
    try: EngineSession(sys.argv[1], runtime)
    except DeployError as error: print(error)
"""


def open_engine(path: Path, *runtimes: str) -> list[str]:
    command = [sys.executable, "-c", OPEN_ENGINE, path, *runtimes]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.usefixtures("tensorrt")
@pytest.mark.parametrize("runtime", ["tensorrt-rtx", "tensorrt"])
def test_engine_that_cannot_be_loaded_is_a_clear_error(make_bundle: MakeBundle, runtime: str) -> None:
    path = open_bundle(make_bundle()).file(ENGINE)
    *_, error = open_engine(path, runtime)
    assert error.startswith(f"{runtime} cannot load {path}: ")


@pytest.mark.usefixtures("tensorrt")
def test_a_process_that_drove_one_tensorrt_does_not_drive_the_other(make_bundle: MakeBundle) -> None:
    *_, error = open_engine(open_bundle(make_bundle()).file(ENGINE), "tensorrt", "tensorrt-rtx")
    assert "has driven another runtime than tensorrt-rtx" in error


class Runner:
    """An engine of two sizes, as far as Polygraphy's runner shows it."""

    def __init__(self, engine: Any, *, allocation_strategy: str) -> None:
        self.engine, self.num_optimization_profiles = self, 2
        self.profiles: list[int] = []

    def activate(self) -> None:
        """There is nothing to load."""

    def get_input_metadata(self, *, use_numpy_dtypes: bool) -> dict[str, Any]:
        return {"x": SimpleNamespace(dtype=np.float16)}

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, int]]:
        width = (8, 4)[index]
        return [(1, width), (2, width), (4, width)]

    def set_profile(self, index: int) -> None:
        self.profiles.append(index)

    def infer(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"y": 2 * feeds["x"]}


def test_engine_is_told_which_of_its_sizes_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", "1")
    monkeypatch.setattr(importlib.import_module("polygraphy.config"), "USE_TENSORRT_RTX", True)
    monkeypatch.setattr(importlib.import_module("polygraphy.backend.trt"), "TrtRunner", Runner)
    opened = EngineSession(tmp_path / "engine", "tensorrt-rtx")
    for shape in ((4, 8), (1, 4), (2, 8)):
        doubled = opened.run({"x": np.ones(shape, np.float32)})["y"]
        assert (doubled.dtype, doubled.shape) == (np.float16, shape)
    assert opened._runner.profiles == [1, 0]
    for shape in ((5, 8), (2, 6)):
        with pytest.raises(DeployError, match=rf"was not built for x \[{shape[0]}, {shape[1]}\]"):
            opened.run({"x": np.ones(shape, np.float32)})


def test_engine_of_tensorrt_is_built_for_what_the_manifest_says(
    make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(make_bundle())
    rtx, cpu = bundle.manifest.variants
    variant = replace(rtx, runtime="tensorrt", path=cpu.path)
    asked = []

    def kept(*arguments: Any) -> Any:
        asked.append(arguments)
        return tmp_path / "transformer.engine", None

    monkeypatch.setattr(session, "kept_engine", kept)
    monkeypatch.setattr(session, "EngineSession", lambda *arguments: arguments)
    opened = open_variant(bundle, variant, cache=tmp_path)
    assert opened == (tmp_path / "transformer.engine", "tensorrt")
    request = EngineRequest(
        runtime="tensorrt",
        graph=str(bundle.path / "transformer/model.onnx"),
        compute_capabilities=(),
        latent_sizes=((8, 8), (8, 4)),
        num_tokens=23,
        batches=(1, 2, 4),
    )
    digest = bundle.manifest.files["transformer/model.onnx"].sha256
    assert asked == [(request, {"transformer/model.onnx": digest}, tmp_path)]


def test_graph_runs_on_the_providers_of_its_runtime(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(make_bundle())
    variant = replace(bundle.manifest.variants[1], runtime="onnxruntime-cuda")
    with pytest.raises(DeployError, match="has no CUDAExecutionProvider here"):
        open_variant(bundle, variant)
    made = []

    class Recorded(Session):
        def __init__(self, path: Path, **options: Any) -> None:
            made.append((path, options["providers"]))

    monkeypatch.setattr(session, "Session", Recorded)
    open_variant(bundle, variant)
    open_variant(bundle, replace(variant, runtime="onnxruntime-tensorrt"))
    cuda = ("CUDAExecutionProvider", "CPUExecutionProvider")
    path = bundle.path / variant.path
    assert made == [(path, cuda), (path, ("TensorrtExecutionProvider", *cuda))]


def test_missing_extra_says_how_to_install_it() -> None:
    with (
        pytest.raises(DeployError, match=r"needs nothing_like_it, .* pip install 'hptool\[edge\]'"),
        extra("edge"),
    ):
        import nothing_like_it  # noqa: F401
