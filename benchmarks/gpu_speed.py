"""What a step of a published model takes on a GPU: the original, what is left of it, and that in INT4.

    python -m benchmarks.gpu_speed measure --scratch DIRECTORY     # 30 GB of disk, some 10 minutes
    python -m benchmarks.gpu_speed table                           # docs/gpu.md from what was measured
    python -m benchmarks.gpu_speed measure --small --device cpu    # two tiny models, to see that it runs

Geometries are the published ones and weights random: time and memory do not depend on them. Every row runs in
a process of its own; memory is what it took of the GPU, all that it keeps for later included.
"""

from __future__ import annotations

import gc
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
import typer
from diffusers import AutoencoderKL

import toolchain.families
from benchmarks import gpu_distill
from benchmarks.machine import machine
from benchmarks.scale_steps import draw_inputs, num_tokens
from benchmarks.synthetic import STUDENTS, Student, write_student
from deploy.bundle import open_bundle
from deploy.memory import TILE
from deploy.session import CONVOLVING_OPTIONS, PROVIDERS, Session, open_variant
from export.encoders import lower_vae_decoder
from toolchain.artifacts import read_json, write_json
from toolchain.families.mmdit import MMDiT, TextStates
from toolchain.geometry import Unit

RESULTS = Path(__file__).parent / "results" / "gpu_speed.json"
PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"
MODELS = {"SD3.5-Large-Turbo": "sd3.5-large-turbo-pruned", "FLUX.1-schnell": "flux.1-schnell-pruned"}
DECODED = ("1024 x 1024 decoded", "512 x 512 decoded")
SMALL = {"SD3.5, tiny": "tiny-sd3.5", "FLUX.1, tiny": "tiny-flux"}
GIB = 2**30
WARM, STEPS, MOST_SECONDS = 2, 10, 60
_DECODER = (
    Path(toolchain.families.__file__).parent / "published/stabilityai/stable-diffusion-3.5-large-turbo/vae"
)

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
    """Measure every row that is missing, or failed, as what a GPU has no memory for does."""
    results: dict[str, Any] = {"schema_version": 1, "machine": _machine(device), "rows": {}}
    if output.exists():
        results["rows"] = read_json(output)["rows"]
    scratch.mkdir(parents=True, exist_ok=True)
    for title, arguments in _rows(small, device, scratch):
        if "seconds_per_step" not in results["rows"].get(title, {}):
            results["rows"][title] = _ask(*arguments())
            write_json(output, results)


def _machine(device: str) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if device != "cpu" else None
    # By what runs: its package has another name where it has CUDA.
    return machine() | {"gpu": gpu, "onnxruntime": onnxruntime.__version__}


Row = tuple[str, Callable[[], tuple[str, ...]]]
"""What it is called, and the command of this module that measures it, which may need something made first."""


def _rows(small: bool, device: str, scratch: Path) -> Iterator[Row]:
    where = ("--device", device)
    for title, name in (SMALL if small else MODELS).items():
        for compiled, how in (((), "torch"), (("--compiled",), "torch.compile")):
            for whole, what in ((("--whole",), "original"), ((), "pruned")):
                command = ("in-torch", name, *where, *whole, *compiled)
                yield f"{title}: {what}, bfloat16, {how}", partial(tuple, command)
        yield f"{title}: pruned, INT4, onnxruntime", partial(_exported, name, scratch, device)
    sides = (8,) if small else (TILE, TILE // 2)
    for where in dict.fromkeys((device, "cpu")):
        for side in sides:
            command = ("in-decoder", str(side), "--device", where, "--scratch", str(scratch))
            yield f"{8 * side} x {8 * side} decoded, onnxruntime, {where}", partial(tuple, command)


def _exported(name: str, scratch: Path, device: str) -> tuple[str, ...]:
    return "in-bundle", str(_bundle(name, scratch, device))


def _bundle(name: str, scratch: Path, device: str) -> Path:
    """Export the synthetic student, for onnxruntime alone."""
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

    with torch.inference_mode():
        found = _timed(lambda: _require_finite(view.velocity(latents, timesteps, text)))
    print(json.dumps(found | {"gpu_bytes": _used(where) - before}))


def _view(student: Student, device: torch.device, removed: tuple[int, ...]) -> MMDiT:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        transformer = student.kind.plain(**student.config)
    torch.set_default_dtype(torch.float32)
    view = student.kind(transformer.eval().requires_grad_(False), guidance_scale=0.0)
    if removed:
        view = view.without([Unit(index) for index in removed], "zero")
        del transformer
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return view


def _require_finite(found: torch.Tensor) -> None:
    if not torch.isfinite(found).all():
        raise SystemExit("what came out is not finite")


@app.command()
def in_bundle(bundle: Annotated[Path, typer.Argument(help="For the target `here`.")]) -> None:
    """Take steps of a bundle's transformer as a device does."""
    opened = open_bundle(bundle, verify=False)
    variant = next(item for item in opened.manifest.variants if item.target == "here")
    where = torch.device("cuda" if variant.runtime == "onnxruntime-cuda" else "cpu")
    side = opened.manifest.defaults.height // opened.manifest.architecture.vae_scale_factor
    inputs = draw_inputs(bundle / variant.path, side, num_tokens(opened))
    before, started = _used(where), time.perf_counter()
    session = open_variant(opened, variant)
    opening = time.perf_counter() - started
    found = _timed(lambda: _require_finite(torch.from_numpy(session.run(inputs)["velocity"])))
    print(json.dumps(found | {"gpu_bytes": _used(where) - before, "seconds_to_open": opening}))


@app.command()
def in_decoder(
    side: Annotated[int, typer.Argument(help="Latents along a side.")],
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cuda",
    scratch: Annotated[Path, typer.Option(help="Where its graph goes.")] = Path("build/gpu"),
) -> None:
    """Decode latents with the decoder of Stable Diffusion 3.5, of random weights, as a device does."""
    graph = scratch / "decoder" / "model.onnx"
    if not graph.exists():
        graph.parent.mkdir()
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(_DECODER))
        ir.save(lower_vae_decoder(vae, dict(vae.named_parameters())), graph, external_data="weights.data")
    where = torch.device(device)
    runtime = "onnxruntime-cpu" if device == "cpu" else "onnxruntime-cuda"
    latents = np.random.default_rng(0).standard_normal((1, 16, side, side), dtype=np.float32)
    before = _used(where)
    session = Session(graph, providers=PROVIDERS[runtime], cuda_options=CONVOLVING_OPTIONS)
    found = _timed(lambda: _require_finite(torch.from_numpy(session.run({"latents": latents})["image"])))
    print(json.dumps(found | {"gpu_bytes": _used(where) - before}))


def _timed(step: Callable[[], object]) -> dict[str, float]:
    seconds: list[float] = []
    while len(seconds) < WARM + STEPS and sum(seconds) < MOST_SECONDS:
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
    """Write docs/gpu.md, of this and of benchmarks/gpu_distill.py."""
    PAGE.write_text(page(read_json(RESULTS), read_json(gpu_distill.RESULTS)), encoding="utf-8")


def page(found: dict[str, Any], distilled: dict[str, Any]) -> str:
    """The text of docs/gpu.md."""
    on = found["machine"]
    lines = [
        "# On a GPU",
        "",
        "Made by `python -m benchmarks.gpu_speed table`. Weights are random, with the geometry of the",
        "published models: time and memory do not depend on them; quality does, and is not measured here.",
        "",
        "## A step",
        "",
        "`python -m benchmarks.gpu_speed measure` on one",
        f"{on['gpu']}, torch {on['torch']}, onnxruntime {on['onnxruntime']}: the transformer alone,",
        "1024 × 1024, batch 1, medians of 10 steps. Memory is what a process took of the GPU beside CUDA",
        "itself. INT4 is in groups of 64, with activations in float16, as `hptool run` runs a bundle there.",
        f"Decoding is that of one picture, in float32; on the processor it has {on['cores']} cores.",
        "",
        "| | ms | of the first | GPU memory, GB | of the first |",
        "| --- | --- | --- | --- | --- |",
    ]
    for title in (*MODELS, *DECODED):
        rows = {name: row for name, row in found["rows"].items() if name.startswith(title)}
        done = {name: row for name, row in rows.items() if "seconds_per_step" in row}
        for name, row in done.items():
            first = next(iter(done.values()))
            seconds, memory = row["seconds_per_step"], row["gpu_bytes"]
            share = f"{seconds / first['seconds_per_step']:.2f}"
            taken = f"{memory / 1e9:.1f} | {memory / first['gpu_bytes']:.2f}" if memory else "none |"
            lines.append(f"| {name} | {1e3 * seconds:.1f} | {share} | {taken} |")
        lines += [f"| {name} | failed | | | |" for name in rows if name not in done]
        if not rows:
            lines.append(f"| {title} | not measured | | | |")
    lines += [
        "",
        "Removing blocks saves time, four bits save memory. onnxruntime expands 4-bit weights before it",
        "multiplies, so that a step takes about as long as one in 16 bits does in PyTorch. TensorRT, which a",
        "target's profile names first on such a GPU, was not there to be tried.",
        "",
        "## Distilling",
        "",
        "`python -m benchmarks.gpu_distill` on one",
        f"{distilled['machine']['gpu']}, torch {distilled['machine']['torch']}:",
        f"a step of batch {distilled['batch']}, 1024 × 1024, with gradient checkpointing and the paper's set",
        "of blocks for each; a card is tried by letting PyTorch have no more than its memory, less one GiB.",
        "",
        "| | way | s a step | peak, GiB | by arithmetic, GiB | fits 24 GB | fits 48 GB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, model in distilled["models"].items():
        for way, row in model["ways"].items():
            fits = " | ".join("yes" if row["fits"][str(card)] else "no" for card in gpu_distill.CARDS_GIB)
            peak, sum_ = row["peak_bytes"] / GIB, row["arithmetic_bytes"] / GIB
            lines.append(
                f"| {name} | {way} | {row['seconds_per_step']:.3f} | {peak:.1f} | {sum_:.1f} | {fits} |"
            )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    app()
