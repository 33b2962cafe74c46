"""What a report measures itself, here and now: pictures, scores, times, and what devices hold."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from deploy.bench import Bench, Spread
from deploy.choice import obstacle_of
from deploy.errors import DeployError
from deploy.machine import read_machine
from deploy.pipeline import EdgePipeline
from export.errors import ExportError
from export.fit import ModelSize, TargetFit, fit_target
from export.quantize import Bits
from profiles.schema import Profile
from profiles.typed import from_data
from report.evidence import BundleRun, Evidence, StudentRun
from toolchain.data.sources import read_prompts
from toolchain.errors import ToolchainError
from toolchain.evaluate import Painter, ShapesScore, evaluate_shapes, num_batches
from toolchain.families import Model, open_model
from toolchain.progress import Bar
from toolchain.prune import prune
from toolchain.shapes.world import evaluation_captions

__all__ = ["RUNTIME_NAMES", "Measured", "bundle_name", "is_quick", "measure", "torch_step_ms"]

RUNTIME_NAMES = {
    "tensorrt-rtx": "TensorRT-RTX",
    "tensorrt": "TensorRT",
    "onnxruntime-tensorrt": "onnxruntime with TensorRT",
    "onnxruntime-cuda": "onnxruntime on CUDA",
    "openvino": "OpenVINO",
    "onnxruntime-cpu": "onnxruntime",
}
SEED = 0
_QUICK_BYTES = 400_000_000
"""Of weights: with more, opening and painting take minutes to hours, which nobody expects of a report."""
_NUM_PICTURES = 8
_REPEATS = 20
_FAILURES = (ToolchainError, DeployError, ExportError)


@dataclass(kw_only=True)
class Measured:
    """What was found, as far as it could be."""

    machine: str
    when: str
    """The day, in UTC."""
    prompts: list[str] = field(default_factory=list)
    pictures: dict[str, npt.NDArray[np.uint8]] = field(default_factory=dict)
    """By stage, [N, height, width, 3], one for each prompt; noise is the same for all stages."""
    steps_ms: dict[str, Spread] = field(default_factory=dict)
    """By stage, of one sampling step of one picture in torch."""
    scores: dict[str, ShapesScore] = field(default_factory=dict)
    """Of the bundle, on the captions that the stages before it were scored on."""
    benches: dict[str, Bench] = field(default_factory=dict)
    """Of the bundle, by what ran it."""
    fits: dict[str, list[TargetFit]] = field(default_factory=dict)
    """By stage and bits."""
    notes: list[str] = field(default_factory=list)
    """What was not measured, and why."""


def is_quick(evidence: Evidence) -> bool:
    """Whether painting and timing are a matter of a minute or two."""
    if evidence.student is not None:
        size = 4 * evidence.student.plan.geometry.size.parameters
    else:
        assert evidence.bundle is not None
        size = sum(file.bytes for file in evidence.bundle.bundle.manifest.files.values())
    return size <= _QUICK_BYTES


def bundle_name(bundle: BundleRun, runtime: str) -> str:
    """The name of its stage."""
    return f"{bundle.weights} on {RUNTIME_NAMES[runtime]}"


def measure(
    evidence: Evidence, *, prompts: Path | None, targets: Sequence[Profile], paint: bool, bar: Bar
) -> Measured:
    """Measure what can be measured here; what cannot is noted, and the rest goes on.

    Args:
        evidence: What there is.
        prompts: Text file with a prompt a line; None takes captions of the model's own world.
        targets: Devices to say of whether they hold the model.
        paint: Whether models are opened, to paint and be timed.
        bar: Starts progress bars.

    Raises:
        ToolchainError: The prompts cannot be read.
    """
    machine = read_machine()
    versions = [
        f"{name} {machine.packages[name]}"
        for name in ("torch", "onnxruntime", "openvino")
        if name in machine.packages
    ]
    found = Measured(
        machine=f"{machine.processor}, {machine.num_cores} cores ({', '.join(versions)})",
        when=time.strftime("%Y-%m-%d", time.gmtime()),
    )
    given = None if prompts is None else read_prompts(prompts, 1)[:_NUM_PICTURES]
    if evidence.student is not None and targets:
        with _noted(found, "The memory of devices"):
            _fit(evidence.student, targets, found, bar)
    if not paint:
        found.notes.append("Nothing was painted, scored or timed for this report.")
        return found
    runtimes = _runtimes(evidence.bundle)
    if given is None and not _of_shapes(evidence):
        found.notes.append("No prompts were given, so no pictures were painted (--prompts FILE).")
    else:
        found.prompts = given or _captions()
        for name, opener in _openers(evidence, runtimes).items():
            with _noted(found, f"Pictures of {name}"):
                _look_at(name, opener(), evidence, found, bar)
    for runtime in runtimes:
        assert evidence.bundle is not None
        with _noted(found, f"The time with {RUNTIME_NAMES[runtime]}"):
            advance = bar(f"timing, {RUNTIME_NAMES[runtime]}", 1)
            found.benches[runtime] = _bench(evidence.bundle, runtime)
            advance()
    return found


class _noted:  # noqa: N801  # read as a verb: `with _noted(found, "…")`
    """A context in which a failure becomes a note of what is missing."""

    def __init__(self, found: Measured, what: str) -> None:
        self._found, self._what = found, what

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, _FAILURES):
            return False
        self._found.notes.append(f"{self._what} could not be had: {error}")
        return True


def torch_step_ms(model: Model, prompts: list[str]) -> Spread:
    """Times of one sampling step of one picture, guidance included, in float32."""
    noise = _noise(model, 1)
    transformer = model.pipeline.transformer
    marks: list[float] = []
    hooks = (
        transformer.register_forward_pre_hook(lambda *_: marks.append(time.perf_counter())),
        transformer.register_forward_hook(lambda *_: marks.append(time.perf_counter())),
    )
    for _ in range(2):
        model.paint(prompts, noise)
    for hook in hooks:
        hook.remove()
    times = [1000 * (end - start) for start, end in zip(marks[::2], marks[1::2], strict=True)][-_REPEATS:]
    p50, p95 = (float(np.percentile(times, share)) for share in (50, 95))
    return Spread(p50=p50, p95=p95, fewest=min(times))


def _openers(evidence: Evidence, runtimes: Sequence[str]) -> dict[str, Callable[[], Painter]]:
    """By stage, how it is opened."""
    student, bundle = evidence.student, evidence.bundle
    found: dict[str, Callable[[], Painter]] = {}
    if student is not None:
        known: dict[str, Callable[[], Painter]] = {
            "original": lambda: _open_original(student),
            "pruned": lambda: prune(_open_original(student), student.plan),
            "distilled": lambda: open_model(str(student.path)),
        }
        found = {stage.name: known[stage.name] for stage in student.outcome.stages}
    if bundle is not None and runtimes:
        found[bundle_name(bundle, runtimes[0])] = lambda: EdgePipeline.open(
            bundle.bundle.path, runtime=runtimes[0], verify=False
        )
    return found


def _open_original(student: StudentRun) -> Model:
    model = open_model(student.plan.model)
    if adapters := student.outcome.adapters:
        from toolchain.lora import Adapter, bake_

        model = bake_(model, map(Adapter.parse, adapters))
    return model


def _look_at(name: str, painter: Painter, evidence: Evidence, found: Measured, bar: Bar) -> None:
    """Paint with a stage; time it, or score it where nobody has before."""
    advance = bar(f"painting, {name}", 1)
    found.pictures[name] = painter.paint(found.prompts, _noise(painter, len(found.prompts)))
    advance()
    if isinstance(painter, Model):
        found.steps_ms[name] = torch_step_ms(painter, found.prompts[:1])
    elif evidence.student is not None and (before := evidence.student.outcome.stages[0].score) is not None:
        advance = bar(f"ShapesEval, {name}", num_batches(before.num_per_task))
        found.scores[name] = evaluate_shapes(
            painter, num_per_task=before.num_per_task, seed=before.seed, on_batch=advance
        )


def _runtimes(bundle: BundleRun | None) -> list[str]:
    """What can run a bundle here, in the order of its variants."""
    if bundle is None:
        return []
    variants = bundle.bundle.manifest.variants
    return list(dict.fromkeys(item.runtime for item in variants if obstacle_of(item) is None))


def _of_shapes(evidence: Evidence) -> bool:
    return evidence.student is not None and evidence.student.outcome.stages[0].score is not None


def _captions() -> list[str]:
    """Held-out captions of the `shapes` world, of every task in turn."""
    by_task: dict[str, list[str]] = {}
    for caption in evaluation_captions(2, seed=SEED):
        by_task.setdefault(caption.task, []).append(caption.text)
    return list(
        islice((text for texts in zip(*by_task.values(), strict=True) for text in texts), _NUM_PICTURES)
    )


def _noise(painter: Painter, number: int) -> npt.NDArray[np.float32]:
    shape = (number, *painter.latent_shape)
    return np.random.default_rng(SEED).standard_normal(shape, dtype=np.float32)


def _bench(bundle: BundleRun, runtime: str) -> Bench:
    """In a process of its own, whose memory is the bundle's alone."""
    command = [sys.executable, "-m", "toolchain", "bench", str(bundle.bundle.path), "--json"]
    done = subprocess.run([*command, "--runtime", runtime], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DeployError(
            done.stderr.strip().splitlines()[-1] if done.stderr.strip() else str(done.returncode)
        )
    return from_data(Bench, json.loads(done.stdout))


def _fit(student: StudentRun, targets: Sequence[Profile], found: Measured, bar: Bar) -> None:
    """From the original alone: lowering the student too would take as long again, to say the same."""
    size = ModelSize(open_model(student.plan.model, precision="config"), bar=bar)
    stages: tuple[tuple[str, float, Bits], ...] = (
        ("original, 16 bits", 0.0, 16),
        ("student, 16 bits", student.plan.ratio_reached, 16),
        ("student, 4 bits", student.plan.ratio_reached, 4),
    )
    for name, ratio, bits in stages:
        found.fits[name] = [fit_target(size, target, bits, ratio) for target in targets]
