"""What a step of a published model takes on a GPU: the original, what is left of it, and that in INT4.

    python -m benchmarks.gpu_speed measure --scratch DIRECTORY     # 30 GB of disk, some 10 minutes
    python -m benchmarks.gpu_speed table                           # docs/gpu.md from what was measured
    python -m benchmarks.gpu_speed measure --small --device cpu    # two tiny models, to see that it runs

Geometries are the published ones and weights random: time and memory do not depend on them. Every row runs in
a process of its own; memory is what it took of the GPU, all that it keeps for later included.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.machine import machine
from benchmarks.scale_steps import draw_inputs, num_tokens
from benchmarks.synthetic import STUDENTS, Student, write_student
from deploy.bundle import open_bundle
from deploy.session import open_variant
from toolchain.artifacts import read_json, write_json
from toolchain.families.mmdit import MMDiT, TextStates
from toolchain.geometry import Unit

RESULTS = Path(__file__).parent / "results" / "gpu_speed.json"
MODELS = {"SD3.5-Large-Turbo": "sd3.5-large-turbo-pruned", "FLUX.1-schnell": "flux.1-schnell-pruned"}
SMALL = {"SD3.5, tiny": "tiny-sd3.5", "FLUX.1, tiny": "tiny-flux"}
WARM, STEPS = 3, 10

_TARGET = """name = "here"
description = "this machine, by onnxruntime"
extends = "{extends}"
runtimes = ["{runtime}"]
max_batch = 1
"""

app = typer.Typer(add_completion=False)


@app.command()
def measure(
    scratch: Annotated[Path, typer.Option(help="Where checkpoints and bundles go.")] = Path("build/gpu"),
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cuda",
    small: Annotated[bool, typer.Option("--small", help="The same with tiny models.")] = False,
    output: Annotated[Path, typer.Option(help="JSON to write.")] = RESULTS,
) -> None:
    """Measure every row."""
    rows: dict[str, Any] = {}
    for title, name in (SMALL if small else MODELS).items():
        rows[title] = {
            f"{what}, bfloat16, torch{', compiled' if compiled else ''}": _ask(
                "in-torch", name, "--device", device, *whole, *compiled
            )
            for compiled in ((), ("--compiled",))
            for what, whole in (("original", ("--whole",)), ("pruned", ()))
        }
        bundle = _bundle(name, scratch, device)
        rows[title]["pruned, INT4, onnxruntime"] = _ask("in-bundle", str(bundle))
        shutil.rmtree(bundle)
    gpu = torch.cuda.get_device_name() if device != "cpu" else None
    write_json(output, {"schema_version": 1, "machine": machine() | {"gpu": gpu}, "models": rows})
    print(json.dumps(rows, indent=2))


def _bundle(name: str, scratch: Path, device: str) -> Path:
    """Export the synthetic student, for onnxruntime alone."""
    scratch.mkdir(parents=True, exist_ok=True)
    checkpoint, bundle, target = (scratch / each for each in (name, f"{name}-bundle", "here.toml"))
    on_gpu = device != "cpu"
    runtime, extends = ("onnxruntime-cuda", "rtx4090") if on_gpu else ("onnxruntime-cpu", "cpu-x86")
    target.write_text(_TARGET.format(runtime=runtime, extends=extends), encoding="utf-8")
    if not bundle.exists():
        if not checkpoint.exists():
            write_student(checkpoint, name)
        command = [sys.executable, "-c", "from toolchain.cli import main; main()"]
        command += ["export", str(checkpoint), "--target", str(target), "--no-compare"]
        command += ["--output", str(bundle)]
        subprocess.run(command, check=True)
        shutil.rmtree(checkpoint)
    return bundle


def _ask(command: str, *arguments: str) -> dict[str, Any]:
    words = [sys.executable, "-m", "benchmarks.gpu_speed", command, *arguments]
    print("+", *words[1:], flush=True)
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"failed": done.returncode}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(found, flush=True)
    return found


@app.command()
def in_torch(
    name: Annotated[str, typer.Argument(help="A synthetic student.")],
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cuda",
    whole: Annotated[bool, typer.Option("--whole", help="With all blocks.")] = False,
    compiled: Annotated[bool, typer.Option("--compiled", help="By torch.compile.")] = False,
) -> None:
    """Take steps of a transformer in bfloat16."""
    student, where = STUDENTS[name], torch.device(device)
    before = _used(where)
    view = _view(student, where, () if whole else student.removed)
    side, width = student.size // 8, view.transformer.config
    shape = (1, view.latent_channels, side, side)
    tokens = student.t5_tokens + (0 if view.family == "flux" else student.clip_tokens)
    draw = {"device": where, "dtype": torch.bfloat16}
    text = TextStates(
        tokens_BTJ=torch.randn(1, tokens, width.joint_attention_dim, **draw),
        pooled_BP=torch.randn(1, width.pooled_projection_dim, **draw),
    )
    latents, timesteps = torch.randn(shape, **draw), torch.full([1], 500.0, device=where)
    if compiled:
        for block in view.blocks:  # alike, so compiled once for each kind
            block.compile()

    @torch.inference_mode()
    def step() -> None:
        velocity = view.velocity(latents, timesteps, text)
        if not torch.isfinite(velocity).all():
            raise SystemExit("the velocity is not finite")

    print(json.dumps(_timed(step) | {"gpu_bytes": _used(where) - before}))


def _view(student: Student, device: torch.device, removed: tuple[int, ...]) -> MMDiT:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        transformer = student.kind.plain(**student.config)
    torch.set_default_dtype(torch.float32)
    view = student.kind(transformer.eval().requires_grad_(False), guidance_scale=0.0)
    del transformer
    return view.without([Unit(index) for index in removed], "zero") if removed else view


@app.command()
def in_bundle(
    bundle: Annotated[Path, typer.Argument(help="Of one variant.")],
) -> None:
    """Take steps of a bundle's transformer as a device does."""
    opened = open_bundle(bundle, verify=False)
    variant = next(item for item in opened.manifest.variants if item.target == "here")
    where = torch.device("cuda" if variant.runtime == "onnxruntime-cuda" else "cpu")
    side = opened.manifest.defaults.height // opened.manifest.architecture.vae_scale_factor
    inputs = draw_inputs(bundle / variant.path, side, num_tokens(opened))
    before, started = _used(where), time.perf_counter()
    session = open_variant(opened, variant)
    opening = time.perf_counter() - started
    found = _timed(lambda: session.run(inputs))
    print(json.dumps(found | {"gpu_bytes": _used(where) - before, "seconds_to_open": opening}))


def _timed(step: Callable[[], object]) -> dict[str, float]:
    seconds = []
    for _ in range(WARM + STEPS):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return {"seconds_first": seconds[0], "seconds_per_step": statistics.median(seconds[WARM:])}


def _used(device: torch.device) -> int:
    """Bytes of the GPU's memory that are taken, by whomever."""
    if device.type == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


@app.command()
def table() -> None:
    """Write docs/gpu.md."""
    read_json(RESULTS)


if __name__ == "__main__":
    app()
