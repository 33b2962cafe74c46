"""How long a bundle takes on this machine, part by part, and how much memory."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deploy.errors import DeployError, extra
from deploy.pipeline import EdgePipeline

with extra("edge"):
    import numpy as np

__all__ = ["Bench", "Spread", "run_bench"]

_PARTS = ("text_encoders", "transformer", "vae_decoder", "total")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of measured times, in milliseconds."""

    p50: float
    p95: float
    fewest: float


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What making pictures took."""

    target: str
    runtime: str
    reasons: list[str]
    """Why this variant."""
    height: int
    """Pixels, as `width`."""
    width: int
    steps: int
    repeats: int
    cold_ms: float
    """From opening the bundle, its digests included, to the first picture."""
    parts_ms: dict[str, Spread]
    """Of the pictures after the first: text encoders, transformer, decoder and all of it, and each step."""
    peak_bytes: int | None
    """Of this process, resident; None where the system does not say."""


def run_bench(
    bundle: str | Path,
    *,
    target: str | None = None,
    runtime: str | None = None,
    prompt: str = "a photo of a red bicycle",
    steps: int | None = None,
    height: int | None = None,
    width: int | None = None,
    repeats: int = 5,
    threads: int | None = None,
    on_picture: Callable[[], None] = lambda: None,
) -> Bench:
    """Make one picture from nothing, then some more.

    Args:
        bundle: Directory.
        target: As of `EdgePipeline.open`, as `runtime`.
        prompt: A number is put behind it, for a prompt that was encoded is remembered.
        steps: Of sampling; None takes the bundle's default, as for the sizes.
        repeats: Pictures after the first.
        threads: As of `EdgePipeline.open`.
        on_picture: Called after each picture.

    Raises:
        DeployError: The bundle cannot be opened or run here, or `repeats` is not one at least.
    """
    if repeats < 1:
        raise DeployError(f"repeats must be 1 at least, not {repeats}.")
    start = time.perf_counter()
    pipeline = EdgePipeline.open(bundle, target=target, runtime=runtime, threads=threads)
    rounds: list[dict[str, float]] = []
    each_step: list[float] = []
    cold_ms = 0.0
    for index in range(1 + repeats):
        result = pipeline(f"{prompt} {index}", steps=steps, height=height, width=width, seed=index)
        if index == 0:
            cold_ms = 1000 * (time.perf_counter() - start)
        else:
            timings = result.timings_ms
            rounds.append(
                {
                    "text_encoders": timings["text_encoders"],
                    "transformer": timings["transformer"],
                    "vae_decoder": timings["vae_decoder"],
                    "total": timings["total"],
                }
            )
            each_step += timings["steps"]
        on_picture()
    defaults = pipeline.bundle.manifest.defaults
    return Bench(
        target=pipeline.variant.target,
        runtime=pipeline.variant.runtime,
        reasons=pipeline.reasons,
        height=height or defaults.height,
        width=width or defaults.width,
        steps=steps or defaults.num_inference_steps,
        repeats=repeats,
        cold_ms=cold_ms,
        parts_ms={name: _spread([times[name] for times in rounds]) for name in _PARTS}
        | {"step": _spread(each_step)},
        peak_bytes=_peak_bytes(),
    )


def _spread(times: list[float]) -> Spread:
    p50, p95 = (float(np.percentile(times, share)) for share in (50, 95))
    return Spread(p50=p50, p95=p95, fewest=min(times))


def _peak_bytes() -> int | None:
    # On Linux `getrusage` starts from what the process was that started this one.
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))):
        return 1024 * int(found[1])
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
