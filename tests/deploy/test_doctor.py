from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from deploy.doctor import Verdict, find_faults, judge
from deploy.gpu import Gpu, Gpus
from deploy.machine import Machine
from profiles.schema import load_profile

EXTRAS = {
    "compress": ("torch>=2.6",),
    "export": ("torch>=2.6", "nncf>=3.2"),
    "rtx": ("tensorrt-rtx-cu13>=1.7",),
    "tensorrt": ("tensorrt>=10.8",),
    "edge": ("onnxruntime>=1.24",),
    "edge-gpu": ("onnxruntime-gpu>=1.24",),
    "openvino": ("openvino>=2026.2",),
}
BARE = Machine(
    python="3.11.7",
    system="Linux",
    platform="Linux-6.1-x86_64",
    architecture="x86_64",
    processor="Some processor",
    instructions=("AVX2",),
    num_cores=8,
    memory_bytes=32 << 30,
    available_bytes=16 << 30,
    cache="/home/me/.cache/hptool",
    disk_bytes=100 << 30,
    gpus=Gpus(),
    packages={},
    providers=(),
    missing=EXTRAS,
)
CPU, CUDA, TENSORRT = (f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt"))


def machine(*complete: str, gpu: str | None = None, **changes: Any) -> Machine:
    """A machine with some extras installed and, given its compute capability, a GPU."""
    runtime = "onnxruntime-gpu" if "edge-gpu" in complete else "onnxruntime"
    installed = set(complete) & {"edge", "edge-gpu", "export"}
    facts: dict[str, Any] = {
        "missing": {extra: () if extra in complete else lacks for extra, lacks in EXTRAS.items()},
        "packages": {runtime: "1.26.0"} if installed else {},
        "providers": () if not installed else (CUDA, CPU) if runtime == "onnxruntime-gpu" else (CPU,),
    }
    if "edge-gpu" in complete:  # holds all that `edge` does
        facts["missing"] |= {"edge": ()}
    if gpu is not None:
        card = Gpu(name="A card", compute_capability=gpu, memory_bytes=24 << 30)
        facts["gpus"] = Gpus(devices=(card,), cuda_version="13.0", driver_version="580.65")
    return replace(BARE, **facts | changes)


def verdict(machine: Machine, target: str) -> Verdict:
    return judge(machine, load_profile(target))


def test_everything_installed_on_the_device_itself() -> None:
    found = verdict(machine("export", "edge", "rtx", gpu="8.9"), "rtx4090")
    assert found == Verdict(
        target="rtx4090", export=True, engine=True, runtime="tensorrt-rtx", obstacles=(), install=()
    )


def test_an_rtx_engine_is_built_without_a_gpu_and_runs_on_none() -> None:
    found = verdict(machine("export", "edge", "rtx"), "rtx4090")
    assert (found.export, found.engine, found.runtime) == (True, True, "onnxruntime-cpu")
    assert found.obstacles == ("run: there is no GPU here",)
    assert found.install == (), "nothing that is installed makes a GPU"


def test_a_bare_machine_is_told_one_command() -> None:
    found = verdict(BARE, "cpu-x86")
    assert (found.export, found.engine, found.runtime) == (False, None, None)
    assert found.install == ("pip install 'hptool[edge,export,openvino]'",)
    assert found.obstacles == (
        "export: torch>=2.6, nncf>=3.2 not installed",
        "run: onnxruntime>=1.24, openvino>=2026.2 not installed; onnxruntime>=1.24 not installed",
    )


def test_an_engine_is_not_built_from_a_graph_that_cannot_be_exported() -> None:
    assert verdict(machine("edge", "rtx"), "rtx4090").engine is False


@pytest.mark.parametrize("target", ["cpu-x86", "cpu-arm64"])
def test_a_target_without_a_gpu_runs_on_any_processor(target: str) -> None:
    found = verdict(machine("edge"), target)
    assert (found.engine, found.runtime) == (None, "onnxruntime-cpu")


def test_openvino_is_what_a_pc_runs_with_once_it_is_installed() -> None:
    found = verdict(machine("edge", "export"), "cpu-x86")
    assert (found.runtime, found.install) == ("onnxruntime-cpu", ("pip install 'hptool[openvino]'",))
    found = verdict(machine("edge", "export", "openvino"), "cpu-x86")
    assert (found.runtime, found.obstacles, found.install) == ("openvino", (), ())


def test_rtx_is_for_x86() -> None:
    arm = machine("export", "edge", "rtx", gpu="8.9", architecture="aarch64")
    found = verdict(arm, "rtx4090")
    assert (found.engine, found.runtime) == (False, "onnxruntime-cpu")
    assert "engine: TensorRT-RTX is for Linux and Windows on x86-64, and this is Linux on aarch64" in (
        found.obstacles
    )
    mac = machine("export", "edge", "rtx", system="Darwin")
    assert verdict(mac, "rtx4090").engine is False
    windows = machine("export", "edge", "rtx", system="Windows")
    assert verdict(windows, "rtx4090").engine is True


@pytest.mark.parametrize(
    ("gpu", "why"), [(None, "there is no GPU here"), ("8.9", "this GPU has 8.9")], ids=["none", "another"]
)
def test_tensorrt_builds_on_the_gpu_it_builds_for_alone(gpu: str | None, why: str) -> None:
    found = verdict(machine("export", "edge", "tensorrt", gpu=gpu), "h200")
    assert found.engine is False
    assert found.obstacles[0] == (
        f"engine: TensorRT builds on the GPU it builds for, of compute capability 9.0, and {why}"
    )
    there = verdict(machine("export", "edge", "tensorrt", gpu="9.0"), "h200")
    assert (there.engine, there.runtime, there.obstacles) == (True, "tensorrt", ())


def test_the_best_runtime_that_can_be_had_is_what_is_installed() -> None:
    found = verdict(machine("export", "edge", gpu="8.9"), "rtx4090")
    assert found.runtime == "onnxruntime-cpu"
    assert found.install == ("pip install 'hptool[rtx]'",), "CUDA would be the second best"


def test_another_gpu_takes_the_graphs_with_cuda() -> None:
    found = verdict(machine("edge-gpu", gpu="8.6"), "rtx4090")
    assert found.runtime == "onnxruntime-cuda"
    assert "run: its engine is for compute capability 8.9, and this GPU has 8.6" in found.obstacles


def test_the_runtime_for_gpus_replaces_the_other() -> None:
    found = verdict(machine("export", "edge", gpu="8.6"), "h100")
    assert found.install == (
        "pip uninstall -y onnxruntime onnxruntime-gpu",
        "pip install 'hptool[edge-gpu]'",
    )


def test_the_other_never_joins_the_runtime_for_gpus() -> None:
    found = verdict(machine("edge-gpu", "rtx", gpu="8.9"), "rtx4090")
    # `export` brings onnxruntime.
    assert found.install == (
        "pip install 'hptool[export]'",
        "pip uninstall -y onnxruntime onnxruntime-gpu",
        "pip install 'hptool[edge-gpu]'",
    )
    incomplete = machine("edge-gpu", "export", packages={"onnxruntime-gpu": "1.20"})
    incomplete = replace(incomplete, missing=incomplete.missing | {"edge": ("tokenizers>=0.22",)})
    assert verdict(incomplete, "cpu-arm64").install == ("pip install 'hptool[edge-gpu]'",)


def test_a_driver_that_is_too_old_is_named() -> None:
    old = machine("export", "edge", "rtx", gpu="8.9")
    old = replace(old, gpus=replace(old.gpus, cuda_version="12.4"))
    found = verdict(old, "rtx4090")
    assert (found.engine, found.runtime) == (True, "onnxruntime-cpu")
    assert "TensorRT-RTX needs a driver for CUDA 13, and this one is for 12.4" in found.obstacles[0]


def test_a_provider_that_is_not_there_is_named() -> None:
    found = verdict(machine("edge-gpu", gpu="9.0", providers=(CPU,)), "h100")
    assert found.runtime == "onnxruntime-cpu"
    assert f"onnxruntime has no {CUDA} here" in found.obstacles[-1]


def test_a_provider_of_tensorrt_needs_its_libraries() -> None:
    own = replace(load_profile("h100"), runtimes=("onnxruntime-tensorrt", "onnxruntime-cuda"))
    there = machine("edge-gpu", gpu="9.0", providers=(TENSORRT, CUDA, CPU))
    assert judge(there, own).runtime == "onnxruntime-cuda"
    assert "pip install 'hptool[export,tensorrt]'" in judge(there, own).install
    complete = machine("edge-gpu", "tensorrt", gpu="9.0", providers=(TENSORRT, CUDA, CPU))
    found = judge(complete, own)
    assert (found.runtime, found.engine) == ("onnxruntime-tensorrt", None)


def test_files_that_are_not_installed_are_said_to_be_so() -> None:
    found = verdict(replace(BARE, missing={}), "cpu-x86")
    assert found.obstacles[0] == "export: hptool is not installed, only its files are here"


def test_a_healthy_machine_has_no_fault() -> None:
    assert find_faults(machine("export", "edge", "rtx", gpu="8.9")) == []
    assert find_faults(BARE) == []


@pytest.mark.parametrize(("gpu", "kept"), [(None, "onnxruntime"), ("8.9", "onnxruntime-gpu")])
def test_two_onnxruntimes_are_a_fault(gpu: str | None, kept: str) -> None:
    both = machine("edge", gpu=gpu, packages={"onnxruntime": "1.26.0", "onnxruntime-gpu": "1.26.0"})
    (fault,) = find_faults(both)
    assert "both installed" in fault.what
    assert fault.fix == f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install {kept}"


def test_an_onnxruntime_that_cannot_be_imported_is_a_fault() -> None:
    (fault,) = find_faults(machine("edge", providers=(), onnxruntime_fault="ImportError: no symbol"))
    assert fault.what == "onnxruntime is installed and cannot be imported (ImportError: no symbol)"
    assert fault.fix == "pip install --force-reinstall onnxruntime"


def test_a_driver_that_does_not_start_is_a_fault() -> None:
    (fault,) = find_faults(machine("edge", gpus=Gpus(cuda_version="12.8", fault="cuInit answered X (803)")))
    assert fault.what == "the CUDA driver is installed and does not work (cuInit answered X (803))"
