"""A denoising step on a processor: our variants beside torch and OpenVINO, in one run.

    python -m benchmarks.edge_speed measure     # into benchmarks/results/edge_speed.json
    python -m benchmarks.edge_speed table       # writes docs/edge.md

`shapes` as it is shipped, and a transformer of Stable Diffusion 3 with half a billion random parameters.
Every way runs in a process of its own and takes turns with the others; medians over all rounds.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.machine import machine
from benchmarks.scale_steps import GRAPH, draw_inputs, num_tokens
from benchmarks.watch import memory, watch
from deploy.bundle import open_bundle
from toolchain.artifacts import read_json, write_json

app = typer.Typer(add_completion=False, help=__doc__)

RESULTS = Path(__file__).parent / "results" / "edge_speed.json"
PAGE = Path(__file__).parents[1] / "docs" / "edge.md"
LIMITS = """\
## What limits it

- Four bits save memory and the reading of it, not arithmetic. Where many tokens share each weight, a step
  is as long as its products take, and on a processor that multiplies bfloat16 itself those of PyTorch are
  as fast as OpenVINO's, or faster.
- onnxruntime multiplies 4-bit weights in float32. What it is better at is memory: its weights are pages of
  a file, which the system may drop.
- OpenVINO has the weights in memory of its own, in its own order, beside what it computes in.
- Of a small model, the libraries are most of the memory.
"""
ROUNDS = 2
STEPS = 8
MODELS = {"shapes": 8, "mid-sd3": 32}
"""Models, and the latents on a side of their pictures here."""
HALF = "torch float16"
"""Asked about its memory alone: processors compute float16 badly."""
WAYS = (
    HALF,
    "torch bfloat16",
    "torch bfloat16, compiled",
    "onnxruntime",
    "OpenVINO",
    "ours on onnxruntime",
    "ours on OpenVINO",
)


@app.command()
def measure(
    models: Annotated[list[str] | None, typer.Argument(help="Of MODELS; all unless some are named.")] = None,
    scratch: Annotated[Path, typer.Option(help="For the model, bundles and caches.")] = Path("build/edge"),
) -> None:
    """Make the models and bundles that are missing, and let all ways take turns."""
    environment = {"HPTOOL_CACHE": str(scratch / "cache")}
    rows: dict[str, dict[str, Any]] = read_json(RESULTS)["rows"] if RESULTS.exists() else {}
    for model in models or MODELS:
        source, bundle = _source(scratch, model), scratch / f"{model}-bundle"
        if not bundle.exists():
            _run([sys.executable, "-m", "toolchain", "export", source, "-o", str(bundle)], environment)
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for turn in range(ROUNDS):
            for way in WAYS:
                if way == HALF and turn:
                    continue
                command = [sys.executable, "-m", "benchmarks.edge_speed", "one", way, source, str(bundle)]
                lines = _run([*command, "--side", str(MODELS[model])], environment)
                found[way].append(json.loads(lines.splitlines()[-1]))
                print(model, turn, way, found[way][-1], flush=True)
        rows[model] = {
            way: {name: statistics.median(item[name] for item in items) for name in items[0]}
            for way, items in found.items()
        }
        write_json(RESULTS, {"schema_version": 1, "machine": machine(), "rows": rows})


@app.command()
def one(
    way: Annotated[str, typer.Argument(help="One of WAYS.")],
    source: Annotated[str, typer.Argument(help="Model.")],
    bundle: Annotated[Path, typer.Argument(help="The same, exported.")],
    side: Annotated[int, typer.Option(help="Latents on a side.")],
) -> None:
    """Open the transformer in one way and take steps; prints what that took as JSON."""
    opened = open_bundle(bundle, verify=False)
    batch = 2 if opened.manifest.architecture.classifier_free and source == "shapes" else 1
    inputs = draw_inputs(bundle / GRAPH, side, num_tokens(opened), batch)
    started = time.perf_counter()
    take = _open(way, source, bundle)
    take(inputs)  # a compiler works when it is first asked
    opening = time.perf_counter() - started
    seconds = []
    for _ in range(1 if way == HALF else STEPS):
        started = time.perf_counter()
        velocity = take(inputs)
        seconds.append(time.perf_counter() - started)
    if not np.isfinite(velocity).all():
        raise SystemExit("the velocity is not finite")
    now = memory()
    result = {
        "seconds_to_open": opening,
        "seconds_per_step": statistics.median(seconds),
        "resident_bytes": now["VmRSS"],
        "anonymous_bytes": now["RssAnon"],
    }
    print(json.dumps(result))


@app.command()
def table() -> None:
    """Write docs/edge.md."""
    PAGE.write_text(page(read_json(RESULTS)), encoding="utf-8")


def page(results: dict[str, Any]) -> str:
    """The text of docs/edge.md."""
    made_on = results["machine"]
    lines = [
        "# A step on a processor",
        "",
        "Made by `python -m benchmarks.edge_speed table` of what `python -m benchmarks.edge_speed measure`",
        f"measured on {made_on['processor']}, {made_on['cores']} cores, torch {made_on['torch']},",
        f"onnxruntime {made_on['onnxruntime']}. INT4 in groups of 64; torch holds the model unquantised.",
        "Every way in a process of its own, all of them in turn; medians.",
        "",
    ]
    for model, rows in results["rows"].items():
        eager, half = rows["torch bfloat16"], rows[HALF]
        own = rows["OpenVINO"]
        lines += [f"## {model}", ""]
        lines += ["| | ms a step | of torch bfloat16 | of OpenVINO | memory, MB | of torch float16 |"]
        lines += ["|---|---|---|---|---|---|"]
        for way, row in rows.items():
            seconds, resident = row["seconds_per_step"], row["resident_bytes"]
            ratios = (seconds / eager["seconds_per_step"], seconds / own["seconds_per_step"])
            cells = [way, f"{1000 * seconds:.1f}", *(f"{ratio:.2f}" for ratio in ratios)]
            cells += [f"{resident / 1e6:.0f}", f"{resident / half['resident_bytes']:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, LIMITS])


def _open(way: str, source: str, bundle: Path) -> Callable[[dict[str, Any]], Any]:
    if way.startswith("torch"):
        return _torch(source, way)
    if way == "OpenVINO":
        import openvino

        compiled = openvino.Core().compile_model(str(bundle / GRAPH), "CPU")
        return lambda inputs: compiled(inputs)[0]
    if way == "onnxruntime":
        import onnxruntime

        session = onnxruntime.InferenceSession(bundle / GRAPH, providers=["CPUExecutionProvider"])
        return lambda inputs: session.run(None, inputs)[0]
    from deploy.prepared import cache_directory
    from deploy.session import open_variant

    runtime = "openvino" if way == "ours on OpenVINO" else "onnxruntime-cpu"
    opened = open_bundle(bundle, verify=False)
    variant = next(item for item in opened.manifest.variants if item.runtime == runtime)
    run = open_variant(opened, variant, cache=cache_directory()).run
    return lambda inputs: run(inputs)["velocity"]


def _torch(source: str, way: str) -> Callable[[dict[str, Any]], Any]:
    import torch

    from toolchain.families import open_model

    dtype = torch.float16 if way == HALF else torch.bfloat16
    transformer = open_model(source).pipeline.transformer.to(dtype)
    if way.endswith("compiled"):
        for block in transformer.transformer_blocks:  # one is compiled for all that are alike
            block.compile()

    def take(inputs: dict[str, Any]) -> Any:
        tensors = {name: torch.from_numpy(array).to(dtype) for name, array in inputs.items()}
        with torch.inference_mode():
            return transformer(**tensors, return_dict=False)[0].float().numpy()

    return take


def _source(scratch: Path, model: str) -> str:
    if model == "shapes":
        return model
    path = scratch / model
    if not path.exists():
        scratch.mkdir(parents=True, exist_ok=True)
        _run([sys.executable, "-m", "benchmarks.synthetic", model, str(path)], {})
    return str(path)


def _run(command: list[str], environment: dict[str, str]) -> str:
    watched = watch(command, environment=environment)
    if watched.status:
        raise SystemExit(f"{' '.join(command)} failed: {watched.errors}")
    return watched.output


if __name__ == "__main__":
    app()
