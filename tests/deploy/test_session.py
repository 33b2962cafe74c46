from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from deploy import session
from deploy.bundle import open_bundle
from deploy.errors import DeployError, extra
from deploy.session import Session, choose_variant, open_variant

MakeBundle = Callable[..., Path]


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


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    def pretend(compute_capability: str | None) -> None:
        monkeypatch.setattr(session, "gpu_compute_capability", lambda: compute_capability)

    return pretend


def test_matching_gpu_takes_its_engine(
    make_bundle: MakeBundle, gpu: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu("8.9")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    variant, reasons = choose_variant(open_bundle(make_bundle()), None)
    assert variant.target == "rtx4090"
    assert reasons == ["rtx4090: runs here on the GPU it was built for"]


def test_engine_needs_its_runtime(
    make_bundle: MakeBundle, gpu: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu("8.9")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorrt_rtx" else find_spec(name)
    )
    variant, reasons = choose_variant(open_bundle(make_bundle()), None)
    assert variant.target == "cpu-x86"
    assert reasons[0] == "rtx4090: passed over, tensorrt_rtx is not installed (pip install 'hptool[rtx]')"


@pytest.mark.parametrize(
    ("found", "why"), [(None, "8.9, and there is none"), ("9.0", "8.9, and this GPU has 9.0")]
)
def test_other_machine_takes_onnxruntime_and_says_why(
    make_bundle: MakeBundle, gpu: Callable[[str | None], None], found: str | None, why: str
) -> None:
    gpu(found)
    bundle = open_bundle(make_bundle())
    variant, reasons = choose_variant(bundle, None)
    assert variant.target == "cpu-x86"
    assert [reason.split(":")[0] for reason in reasons] == ["rtx4090", "cpu-x86"]
    assert why in reasons[0]
    assert isinstance(open_variant(bundle, variant, threads=1), Session)


def test_requested_engine_never_falls_back(
    make_bundle: MakeBundle, gpu: Callable[[str | None], None]
) -> None:
    gpu(None)
    with pytest.raises(DeployError, match=r"variant for 'rtx4090' cannot run here: its engine needs a GPU"):
        choose_variant(open_bundle(make_bundle()), "rtx4090")


def test_requested_variant_is_taken_where_a_better_one_would_run(
    make_bundle: MakeBundle, gpu: Callable[[str | None], None]
) -> None:
    gpu("8.9")
    variant, reasons = choose_variant(open_bundle(make_bundle()), "cpu-x86")
    assert (variant.target, reasons) == ("cpu-x86", ["cpu-x86: requested"])


def test_unknown_target_names_those_there(make_bundle: MakeBundle) -> None:
    with pytest.raises(DeployError, match="has no variant for 'rtx5090', only for rtx4090, cpu-x86"):
        choose_variant(open_bundle(make_bundle()), "rtx5090")


def test_nothing_to_run_is_an_error(make_bundle: MakeBundle, gpu: Callable[[str | None], None]) -> None:
    gpu(None)
    bundle = open_bundle(make_bundle())
    engines = [variant for variant in bundle.manifest.variants if variant.runtime == "tensorrt-rtx"]
    bundle = replace(bundle, manifest=replace(bundle.manifest, variants=engines))
    with pytest.raises(DeployError, match=r"No variant of .* can run here \(rtx4090: passed over"):
        choose_variant(bundle, None)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the extra `rtx`")
def test_engine_that_cannot_be_loaded_is_a_clear_error(make_bundle: MakeBundle) -> None:
    path = open_bundle(make_bundle()).file("engines/rtx4090/transformer.engine")
    # In a process of its own: Polygraphy settles on one TensorRT when it is first imported.
    code = (
        "import sys; from deploy.errors import DeployError; from deploy.session import EngineSession\n"
        "try: EngineSession(sys.argv[1])\n"
        "except DeployError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert f"TensorRT-RTX cannot load {path}: " in done.stdout


def test_missing_extra_says_how_to_install_it() -> None:
    with (
        pytest.raises(DeployError, match=r"needs nothing_like_it, .* pip install 'hptool\[edge\]'"),
        extra("edge"),
    ):
        import nothing_like_it  # noqa: F401
