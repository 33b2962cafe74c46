"""Which of a bundle's variants runs on this machine, and why not the others."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from contextlib import suppress

from rich.filesize import decimal

from deploy.bundle import ENGINE_RUNTIMES, Bundle, Variant, graph_files
from deploy.engine import EXTRAS, MODULES
from deploy.errors import DeployError
from deploy.gpu import free_gpu_bytes, gpu_compute_capability
from deploy.memory import Placement, place_on_gpu
from deploy.session import PROVIDERS, available_providers
from profiles.schema import PROCESSOR_RUNTIMES

__all__ = ["choose_variant", "obstacle_of", "place_others"]

_WITHOUT_ENGINE = ("onnxruntime-tensorrt", "onnxruntime-cuda", "openvino", "onnxruntime-cpu")
"""Best first."""
_COMPILING = 3.5
"""Bytes of memory for each of the graph's files with OpenVINO: 1.3 for its weights, the rest to compute in;
measured at 3.4 GB, where 2.6 were taken for pictures of 768 pixels, and more goes with their area."""

_OLDEST_OPENVINO = 2026, 2
"""Those before refuse a rotary embedding of free sizes, or compute another one."""


def choose_variant(
    bundle: Bundle, requested: str | None, *, runtime: str | None = None, available: int | None = None
) -> tuple[Variant, list[str]]:
    """Choose how the transformer runs on this machine, and say why.

    With a target's name it is the first of that target's variants that this machine can run, and never
    another target's. Otherwise it is the first engine that this machine can run, one that was made for this
    GPU before one that suits it too; without any, what onnxruntime runs on the GPU, then what runs on the
    processor, OpenVINO first.

    Args:
        requested: Name of a target; None leaves the choice open.
        runtime: What has to run it; None leaves that open too.
        available: Bytes of memory that are free; None, where the system does not say, is enough.

    Raises:
        DeployError: The requested target is not in the bundle or cannot run here, or none can.
    """
    variants = [item for item in bundle.manifest.variants if runtime in (None, item.runtime)]
    if not variants:
        there = ", ".join(dict.fromkeys(item.runtime for item in bundle.manifest.variants))
        raise DeployError(f"{bundle.path} has no variant for the runtime {runtime!r}, only for {there}.")
    if requested is None:
        candidates = _best_first(variants)
    elif not (candidates := [variant for variant in variants if variant.target == requested]):
        targets = ", ".join(dict.fromkeys(variant.target for variant in variants))
        raise DeployError(
            f"{bundle.path} has no variant for {requested!r}, only for {targets}. "
            f"Choose one of these, or export again with --target {requested}."
        )
    reasons: list[str] = []
    for variant in candidates:
        obstacle = obstacle_of(variant) or _too_large(bundle, variant, available)
        name = f"{variant.target} ({variant.runtime})"
        if obstacle is None:
            return variant, [*reasons, f"{name}: {'runs here' if requested is None else 'requested'}"]
        reasons.append(f"{name}: passed over, {obstacle}")
    if requested is not None:
        raise DeployError(
            f"The variant for {requested!r} cannot run here: {'; '.join(reasons)}. "
            "Run it on that device, or leave the target out to take what runs here."
        )
    raise DeployError(
        f"No variant of {bundle.path} can run here ({'; '.join(reasons)}). "
        "Export again with --target cpu-x86 as well, or run it on its device."
    )


def place_others(bundle: Bundle, variant: Variant) -> Placement:
    """Choose which parts run on the GPU beside the transformer, and say why; none where that does not."""
    if variant.runtime in PROCESSOR_RUNTIMES:
        return Placement()
    provider = PROVIDERS["onnxruntime-cuda"][0]
    if provider not in available_providers():
        missing = f"onnxruntime has no {provider} here (pip install 'hptool[edge-gpu]')"
        return Placement(reason=f"text encoders and decoder: on the processor, which takes longer; {missing}")
    return place_on_gpu(bundle, free_gpu_bytes())


def _too_large(bundle: Bundle, variant: Variant, available: int | None) -> str | None:
    """Return what OpenVINO takes if that is more than there is; onnxruntime needs less than half as much."""
    if variant.runtime != "openvino" or available is None:
        return None
    files = graph_files(bundle.manifest.files, variant.path)
    needed = round(_COMPILING * sum(file.bytes for file in files.values()))
    if needed <= available:
        return None
    return f"it takes {decimal(needed)} of memory with OpenVINO, and {decimal(available)} are available"


def _best_first(variants: list[Variant]) -> list[Variant]:
    found = gpu_compute_capability()

    def rank(variant: Variant) -> tuple[int, bool]:
        # No engine is better than another by its kind: of one target, the profile's order decides.
        kind = -1 if variant.runtime in ENGINE_RUNTIMES else _WITHOUT_ENGINE.index(variant.runtime)
        return kind, variant.compute_capabilities[:1] != [found]

    return sorted(variants, key=rank)


def obstacle_of(variant: Variant) -> str | None:
    """Return what keeps a variant from running on this machine."""
    runtime, capabilities = variant.runtime, " or ".join(variant.compute_capabilities)
    if runtime == "onnxruntime-cpu":
        return None
    if runtime == "openvino":
        return _openvino_obstacle()
    found = gpu_compute_capability()
    if runtime == "tensorrt-rtx" or runtime == "tensorrt":
        if found is None:
            return f"its engine needs a GPU of compute capability {capabilities}, and there is none"
        if found not in variant.compute_capabilities:
            return f"its engine is for compute capability {capabilities}, and this GPU has {found}"
        for module in (MODULES[runtime], "polygraphy"):
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed (pip install 'hptool[{EXTRAS[runtime]}]')"
        return None
    if found is None:
        return "it needs a GPU, and there is none"
    if absent := [name for name in PROVIDERS[runtime] if name not in available_providers()]:
        return f"onnxruntime has no {absent[0]} here (pip install 'hptool[edge-gpu]')"
    return None


def _openvino_obstacle() -> str | None:
    advice = "(pip install 'hptool[openvino]')"
    if importlib.util.find_spec("openvino") is None:
        return f"openvino is not installed {advice}"
    with suppress(importlib.metadata.PackageNotFoundError):  # not all packagers say a version
        version = importlib.metadata.version("openvino")
        if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_OPENVINO:
            return f"openvino {version} is older than {'.'.join(map(str, _OLDEST_OPENVINO))} {advice}"
    return None
