from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from deploy import choice
from deploy.bundle import Bundle, Runtime, Shapes, Variant, open_bundle
from deploy.choice import choose_variant
from deploy.errors import DeployError

MakeBundle = Callable[..., Path]
Pretend = Callable[..., None]

SHAPES = Shapes(sizes=[(64, 64)], max_batch=1, text_tokens=23)
GRAPH = "transformer/model.onnx"
CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"


def variant(target: str, runtime: Runtime, *capabilities: str) -> Variant:
    """A variant of float32, so that the bundle's one graph suits all runtimes."""
    return Variant(
        target=target,
        runtime=runtime,
        path="engines/sm89-01234567.engine" if runtime == "tensorrt-rtx" else GRAPH,
        activations="float32",
        compute_capabilities=list(capabilities),
        shapes=SHAPES if capabilities else None,
    )


CPU = variant("cpu-x86", "onnxruntime-cpu")
RTX3060 = variant("rtx3060-12gb", "tensorrt-rtx", "8.6", "8.9")
RTX3060_CUDA = variant("rtx3060-12gb", "onnxruntime-cuda")
RTX4090 = variant("rtx4090", "tensorrt-rtx", "8.9", "8.6")
RTX4090_CUDA = variant("rtx4090", "onnxruntime-cuda")
H100 = variant("h100", "tensorrt", "9.0")
H100_EP = variant("h100", "onnxruntime-tensorrt")
H100_CUDA = variant("h100", "onnxruntime-cuda")
ALL = [CPU, RTX3060, RTX3060_CUDA, RTX4090, RTX4090_CUDA, H100_EP, H100_CUDA, H100]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """Pretend to be a machine with a GPU, with packages and providers of onnxruntime."""

    def pretend(
        capability: str | None,
        *,
        modules: tuple[str, ...] = ("tensorrt_rtx", "tensorrt", "polygraphy"),
        providers: tuple[str, ...] = (),
    ) -> None:
        monkeypatch.setattr(choice, "gpu_compute_capability", lambda: capability)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in modules else None)
        monkeypatch.setattr(choice, "available_providers", lambda: [*providers, "CPUExecutionProvider"])

    return pretend


@pytest.fixture
def bundle(make_bundle: MakeBundle) -> Bundle:
    return open_bundle(make_bundle(variants=ALL))


@pytest.mark.parametrize(
    ("capability", "providers", "chosen"),
    [
        ("8.6", (), RTX3060),
        ("8.9", (), RTX4090),  # rtx3060's engine would run there too
        ("9.0", (CUDA, TENSORRT), H100),
        ("7.0", (CUDA, TENSORRT), H100_EP),
        ("7.0", (CUDA,), RTX3060_CUDA),  # any GPU runs it
        ("7.0", (), CPU),
        (None, (CUDA, TENSORRT), CPU),
    ],
)
def test_the_best_that_runs_here_is_taken(
    bundle: Bundle, machine: Pretend, capability: str | None, providers: tuple[str, ...], chosen: Variant
) -> None:
    machine(capability, providers=providers)
    found, reasons = choose_variant(bundle, None)
    assert found == chosen
    assert reasons[-1] == f"{chosen.target} ({chosen.runtime}): runs here"


@pytest.mark.parametrize(
    ("capability", "modules", "why"),
    [
        (None, (), "its engine needs a GPU of compute capability 8.9 or 8.6, and there is none"),
        ("9.0", (), "its engine is for compute capability 8.9 or 8.6, and this GPU has 9.0"),
        ("8.9", ("polygraphy",), "tensorrt_rtx is not installed (pip install 'hptool[rtx]')"),
        ("8.9", ("tensorrt_rtx",), "polygraphy is not installed (pip install 'hptool[rtx]')"),
    ],
)
def test_what_was_passed_over_has_its_reason(
    bundle: Bundle, machine: Pretend, capability: str | None, modules: tuple[str, ...], why: str
) -> None:
    machine(capability, modules=modules)
    found, reasons = choose_variant(bundle, None)
    assert found == CPU
    assert f"rtx4090 (tensorrt-rtx): passed over, {why}" in reasons


def test_tensorrt_needs_its_own_package(bundle: Bundle, machine: Pretend) -> None:
    machine("9.0", modules=("tensorrt_rtx", "polygraphy"))
    _, reasons = choose_variant(bundle, None)
    why = "tensorrt is not installed (pip install 'hptool[tensorrt]')"
    assert f"h100 (tensorrt): passed over, {why}" in reasons


def test_onnxruntime_on_a_gpu_needs_its_provider(bundle: Bundle, machine: Pretend) -> None:
    machine("7.0", providers=(CUDA,))
    _, reasons = choose_variant(bundle, None)
    why = "onnxruntime has no TensorrtExecutionProvider here (pip install 'hptool[edge-gpu]')"
    assert f"h100 (onnxruntime-tensorrt): passed over, {why}" in reasons


def test_of_the_requested_target_the_best_is_taken_in_the_profiles_order(
    bundle: Bundle, machine: Pretend
) -> None:
    machine("9.0", providers=(CUDA, TENSORRT))
    assert choose_variant(bundle, "h100") == (H100_EP, ["h100 (onnxruntime-tensorrt): requested"])
    machine("9.0", providers=(CUDA,))
    found, reasons = choose_variant(bundle, "h100")
    assert found == H100_CUDA
    assert [reason.partition(":")[0] for reason in reasons] == [
        "h100 (onnxruntime-tensorrt)",
        "h100 (onnxruntime-cuda)",
    ]


def test_requested_variant_is_taken_where_a_better_one_would_run(bundle: Bundle, machine: Pretend) -> None:
    machine("8.9")
    assert choose_variant(bundle, "cpu-x86") == (CPU, ["cpu-x86 (onnxruntime-cpu): requested"])


def test_requested_target_never_falls_back_to_another(bundle: Bundle, machine: Pretend) -> None:
    machine("8.0", providers=())
    with pytest.raises(
        DeployError,
        match=r"variant for 'rtx4090' cannot run here: rtx4090 \(tensorrt-rtx\): passed over, .*; "
        r"rtx4090 \(onnxruntime-cuda\): passed over",
    ):
        choose_variant(bundle, "rtx4090")


def test_unknown_target_names_those_there(bundle: Bundle) -> None:
    with pytest.raises(
        DeployError, match="no variant for 'rtx5090', only for cpu-x86, rtx3060-12gb, rtx4090, h100"
    ):
        choose_variant(bundle, "rtx5090")


def test_nothing_to_run_is_an_error(bundle: Bundle, machine: Pretend) -> None:
    machine(None)
    bundle = replace(bundle, manifest=replace(bundle.manifest, variants=[RTX4090]))
    with pytest.raises(DeployError, match=r"No variant of .* can run here \(rtx4090 .*passed over"):
        choose_variant(bundle, None)
