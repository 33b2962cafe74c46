"""What a machine can do for a target device, and what to install for the rest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from deploy.machine import Machine
from profiles.schema import PROCESSOR_RUNTIMES, Profile, Runtime

__all__ = ["Fault", "Verdict", "find_faults", "judge"]

_RTX_CUDA = 13
"""Of the TensorRT-RTX that the extra `rtx` installs; an older driver does not run it."""

_PROVIDERS = {
    "onnxruntime-cpu": "CPUExecutionProvider",
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
}
_EXTRAS: dict[Runtime, tuple[str, ...]] = {
    "tensorrt-rtx": ("edge", "rtx"),
    "tensorrt": ("edge", "tensorrt"),
    "onnxruntime-tensorrt": ("edge-gpu", "tensorrt"),
    "onnxruntime-cuda": ("edge-gpu",),
    "openvino": ("edge", "openvino"),
    "onnxruntime-cpu": ("edge",),
}
"""What has to be installed to run with each; text encoders and VAE are always onnxruntime's."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that is broken, whatever the target."""

    what: str
    fix: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a machine can do for one target."""

    target: str
    export: bool
    """Whether its ONNX graphs can be made."""
    engine: bool | None
    """Whether its engine can be built; None: it has none."""
    runtime: Runtime | None
    """What a bundle for it runs with here. Every bundle has a variant for processors, so onnxruntime-cpu may
    stand for a target that does not name it."""
    obstacles: tuple[str, ...]
    """Why not, or why with nothing better."""
    install: tuple[str, ...]
    """Commands, in this order, after which this machine does all that it can for the target."""


@dataclass(frozen=True, kw_only=True)
class _Obstacle:
    reason: str
    extras: tuple[str, ...] = ()
    """Which take it away; none: nothing that is installed does."""


def judge(machine: Machine, profile: Profile) -> Verdict:
    """Judge what can be exported, built and run."""
    exporting = _lacking(machine, ("export",))
    building, engine = None, next((item for item in profile.runtimes if item.startswith("tensorrt")), None)
    if engine is not None:
        building = _engine_obstacle(machine, profile, engine)
    running, runtime = _choose_runtime(machine, profile)
    obstacles = {"export": exporting, "engine": building, "run": running}
    named = {stage: obstacle for stage, obstacle in obstacles.items() if obstacle is not None}
    extras = {extra for obstacle in named.values() for extra in obstacle.extras}
    return Verdict(
        target=profile.name,
        export=exporting is None,
        engine=None if engine is None else building is None and exporting is None,
        runtime=runtime,
        obstacles=tuple(f"{stage}: {obstacle.reason}" for stage, obstacle in named.items()),
        install=_commands(machine, extras),
    )


def find_faults(machine: Machine) -> list[Fault]:
    """Find what is broken whatever the target."""
    faults = []
    if {"onnxruntime", "onnxruntime-gpu"} <= machine.packages.keys():
        kept = "onnxruntime-gpu" if machine.gpus.devices else "onnxruntime"
        faults.append(
            Fault(
                what="onnxruntime and onnxruntime-gpu are both installed; they write the same files, and "
                "what was installed last broke the other",
                fix=f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install {kept}",
            )
        )
    elif machine.onnxruntime_fault is not None:
        name = "onnxruntime-gpu" if "onnxruntime-gpu" in machine.packages else "onnxruntime"
        faults.append(
            Fault(
                what=f"{name} is installed and cannot be imported ({machine.onnxruntime_fault})",
                fix=f"pip install --force-reinstall {name}",
            )
        )
    if machine.gpus.fault is not None:
        faults.append(
            Fault(
                what=f"the CUDA driver is installed and does not work ({machine.gpus.fault})",
                fix="restart the machine; if that does not help, install the driver again",
            )
        )
    return faults


def _choose_runtime(machine: Machine, profile: Profile) -> tuple[_Obstacle | None, Runtime | None]:
    """The first runtime that works, and what is to be said of the better ones."""
    candidates: list[Runtime] = [*profile.runtimes]
    if "onnxruntime-cpu" not in candidates:
        candidates.append("onnxruntime-cpu")
    reasons: list[str] = []
    extras: tuple[str, ...] = ()
    for runtime in candidates:
        obstacle = _runtime_obstacle(machine, profile, runtime)
        if obstacle is None:
            if not reasons:
                return None, runtime
            return _Obstacle(reason="; ".join(reasons), extras=extras), runtime
        # One reason for all of them, as where there is no GPU, is said once.
        reasons = list(dict.fromkeys([*reasons, obstacle.reason]))
        extras = extras or obstacle.extras  # those of the best that can be had
    return _Obstacle(reason="; ".join(reasons), extras=extras), None


def _runtime_obstacle(machine: Machine, profile: Profile, runtime: Runtime) -> _Obstacle | None:
    if runtime not in PROCESSOR_RUNTIMES and not machine.gpus.devices:
        return _Obstacle(reason="there is no GPU here")
    if runtime in ("tensorrt-rtx", "tensorrt") and (other := _other_gpu(machine, profile)):
        return _Obstacle(reason=f"its engine is for compute capability {profile.compute_capability}, {other}")
    if runtime == "tensorrt-rtx":
        if elsewhere := _without_rtx(machine):
            return elsewhere
        cuda = machine.gpus.cuda_version
        if cuda is not None and int(cuda.partition(".")[0]) < _RTX_CUDA:
            return _Obstacle(
                reason=f"TensorRT-RTX needs a driver for CUDA {_RTX_CUDA}, and this one is for {cuda}: "
                "update the driver"
            )
    if lacking := _lacking(machine, _EXTRAS[runtime]):
        return lacking
    provider = _PROVIDERS.get(runtime)
    if provider is not None and provider not in machine.providers:
        return _Obstacle(reason=f"onnxruntime has no {provider} here")
    return None


def _engine_obstacle(machine: Machine, profile: Profile, runtime: Runtime) -> _Obstacle | None:
    if runtime == "tensorrt-rtx":
        return _without_rtx(machine) or _lacking(machine, ("rtx",))
    if other := _other_gpu(machine, profile):
        return _Obstacle(
            reason=f"TensorRT builds on the GPU it builds for, of compute capability "
            f"{profile.compute_capability}, {other}"
        )
    return _lacking(machine, ("tensorrt",))


def _without_rtx(machine: Machine) -> _Obstacle | None:
    if machine.architecture == "x86_64" and machine.system in ("Linux", "Windows"):
        return None
    return _Obstacle(
        reason=f"TensorRT-RTX is for Linux and Windows on x86-64, and this is {machine.system} on "
        f"{machine.architecture}"
    )


def _other_gpu(machine: Machine, profile: Profile) -> str | None:
    """What there is in place of the target's GPU. An engine runs on the first one."""
    if not machine.gpus.devices:
        return "and there is no GPU here"
    found = machine.gpus.devices[0].compute_capability
    return None if found == profile.compute_capability else f"and this GPU has {found}"


def _lacking(machine: Machine, extras: tuple[str, ...]) -> _Obstacle | None:
    if not machine.missing:
        return _Obstacle(reason="hptool is not installed, only its files are here", extras=extras)
    lacking = [extra for extra in extras if machine.missing.get(extra)]
    if not lacking:
        return None
    names = dict.fromkeys(name for extra in lacking for name in machine.missing[extra])
    return _Obstacle(reason=f"{', '.join(names)} not installed", extras=tuple(lacking))


def _commands(machine: Machine, extras: Iterable[str]) -> tuple[str, ...]:
    """What installs extras and leaves one onnxruntime in the environment."""
    wanted = set(extras)
    installed = machine.packages.keys()
    for_gpu = "edge-gpu" in wanted or "onnxruntime-gpu" in installed
    if for_gpu and "edge" in wanted:
        wanted = wanted - {"edge"} | {"edge-gpu"}
    commands = []
    if first := sorted(wanted - {"edge-gpu"}):
        commands.append(f"pip install 'hptool[{','.join(first)}]'")
    if for_gpu and wanted and ("export" in wanted or "onnxruntime" in installed):
        commands += [
            "pip uninstall -y onnxruntime onnxruntime-gpu",
            "pip install 'hptool[edge-gpu]'",
        ]
    elif "edge-gpu" in wanted:
        commands.append("pip install 'hptool[edge-gpu]'")
    return tuple(commands)
