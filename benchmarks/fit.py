"""Whether what `hptool fit` says comes true, and what it says of every device: docs/fit.md.

python -m benchmarks.fit check     # measures, into benchmarks/results/fit.json; needs what scale_export made
python -m benchmarks.fit table     # writes docs/fit.md
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from benchmarks.machine import machine
from benchmarks.synthetic import write_student
from benchmarks.watch import Watched, watch
from deploy.engine import build_memory_bytes
from export.components import Precision
from export.fit import Fit, ModelSize, TargetFit, fit, fit_target
from export.space import stored_bytes
from export.weights import WEIGHTS
from profiles.schema import available_profiles, load_profile
from toolchain.artifacts import read_json, write_json
from toolchain.families import Model, open_model
from toolchain.rules import parse_units

app = typer.Typer(add_completion=False, help=__doc__)

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "fit.json"
SCALE = RESULTS.with_name("scale_export.json")
PAGE = REPOSITORY / "docs" / "fit.md"

SIDES = (64, 96, 128)
"""Pixels of the pictures of `shapes`; it makes none larger."""
PROMPT = "a red circle left of a blue square"
FULL_SIZE = {
    "SD3.5-Large-Turbo": "sd3.5-large-turbo-pruned",
    "FLUX.1-schnell": "flux.1-schnell-pruned",
}
"""What benchmarks/scale_export.py calls them."""
MODELS = {
    "SD3.5-Large-Turbo": ("stabilityai/stable-diffusion-3.5-large-turbo", "25-28,31-34"),
    "FLUX.1-schnell": ("black-forest-labs/FLUX.1-schnell", "11-13,15-17,44-49,51-55"),
}
"""Published models, and what the pruned ones of docs/scale.md lack."""


@app.command()
def check(
    scratch: Annotated[Path, typer.Option(help="That of benchmarks/scale_export.py.")] = Path("build/scale"),
) -> None:
    """Compare predictions with measurements on this machine."""
    rows = [*_shapes(scratch / "shapes-bundle"), *_full_size(read_json(SCALE)["rows"])]
    write_json(RESULTS, {"schema_version": 1, "machine": machine(), "rows": rows})
    for row in rows:
        print(f"{row['what']:60} {row['measured']:>14,} {row['predicted'] / row['measured']:.3f}")


@app.command()
def table() -> None:
    """Write docs/fit.md from what was measured and from the configurations of published models."""
    results = read_json(RESULTS)
    PAGE.write_text(page(results, {name: _both(*facts) for name, facts in MODELS.items()}), encoding="utf-8")


def page(results: dict[str, Any], models: dict[str, tuple[Fit, Fit]]) -> str:
    """The text of docs/fit.md."""
    made_on = results["machine"]
    lines = [
        "# Where models fit",
        "",
        "Made by `python -m benchmarks.fit table`. The first table is what `hptool fit` says, of the",
        "original in 16 bits and of the pruned model of [scale.md](scale.md) in 4 bits, at 1024 × 1024",
        "pixels: memory of the device with one part loaded at a time, and an estimate of a step: what it",
        "takes at the least by the device's peak rates. On a GPU with memory of its own that is the",
        "transformer alone: text encoders and decoder go there as well where they fit, and stay on the",
        "processor where they do not. On a processor it is onnxruntime's; OpenVINO is faster, takes more,",
        "and is chosen only where there is enough.",
        "",
    ]
    headings = [text for name in models for text in (f"{name}, 16 bits", "pruned, 4 bits", "a step ≥")]
    lines += _row(["target", "memory", *headings]) + _row(["---"] * (2 + len(headings)))
    for index, target in enumerate(available_profiles()):
        cells = []
        for original, pruned in models.values():
            cells += [_cell(original.targets[index]), _cell(pruned.targets[index])]
            cells.append(f"{pruned.targets[index].least_step_seconds:.3g} s")
        lines += _row([target, decimal(next(iter(models.values()))[0].targets[index].available), *cells])
    lines += ["", "## Predicted and measured", ""]
    lines += [
        f"Measured by `python -m benchmarks.fit check` on {made_on['processor']}, {made_on['cores']} cores;",
        "the builds of full size are those of [scale.md](scale.md). What an engine holds on a GPU, and",
        "TensorRT's own builder, are not verified; of onnxruntime on a GPU the prediction is made of what",
        "two models took ([gpu.md](gpu.md)). While a large graph is opened each scale of its weights",
        "is in memory once more, a sixteenth of a byte a parameter, which the system can drop and the",
        "prediction leaves out: most of what `hptool run` takes beyond it at full size.",
        "",
    ]
    lines += _row(["", "predicted", "measured", "predicted / measured"]) + _row(["---"] * 4)
    for row in results["rows"]:
        sizes = (decimal(row["predicted"]), decimal(row["measured"]))
        lines += _row([row["what"], *sizes, f"{row['predicted'] / row['measured']:.3f}"])
    return "\n".join(lines) + "\n"


def _both(source: str, removed: str) -> tuple[Fit, Fit]:
    model = open_model(source, precision="config")
    targets = [load_profile(name) for name in available_profiles()]
    pruned = model.without_units(parse_units(removed, model.geometry))
    return fit(model, targets, bits=16), fit(pruned, targets, bits=4)


def _cell(found: TargetFit) -> str:
    if not found.missing:
        return decimal(found.in_turn)
    return f"**{decimal(found.in_turn)}**, too large by {decimal(found.missing)}"


def _row(cells: list[str]) -> list[str]:
    return ["| " + " | ".join(cells) + " |"]


def _shapes(bundle: Path) -> list[dict[str, Any]]:
    if not bundle.exists():
        _succeeded(watch([*_hptool("export"), "shapes", "-t", "cpu-x86", "-t", "rtx4090", "-o", str(bundle)]))
    model = open_model("shapes", precision="none")
    size = ModelSize(model)
    stored = (bundle / "transformer" / WEIGHTS).stat().st_size
    rows = [_weights("shapes, weights of the transformer", model, stored)]
    for side in SIDES:
        options = [
            "--runtime",
            "onnxruntime-cpu",
            "--height",
            str(side),
            "--width",
            str(side),
            "-o",
            str(bundle.with_suffix(".png")),
        ]
        measured = _succeeded(watch([*_hptool("run"), str(bundle), PROMPT, *options])).peak_bytes
        rows.append(_run(f"shapes, `hptool run` at {side} × {side}", size, side, measured))
    engine = bundle.with_suffix(".engine")
    steps = [sys.executable, "-m", "benchmarks.scale_steps", "build-engine", str(bundle), str(engine)]
    built = _succeeded(watch(steps)).peak_bytes
    engine.unlink()
    expected = build_memory_bytes(size.parts["transformer"].stored[4], size.num_nodes)
    return [*rows, {"what": "shapes, building an engine", "predicted": expected, "measured": built}]


def _full_size(known: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, subject in FULL_SIZE.items():
        source, removed = MODELS[name]
        model = open_model(source, precision="config")
        pruned = model.without_units(parse_units(removed, model.geometry))
        size, what = ModelSize(pruned), f"{name} without {removed}"
        stored = known[subject]["export"]["transformer_bytes"]
        rows.append(_weights(f"{what}, weights of the transformer (measured with its graph)", pruned, stored))
        expected = build_memory_bytes(size.parts["transformer"].stored[4], size.num_nodes)
        built = known[subject]["engine"]["peak_bytes"]
        rows.append({"what": f"{what}, building an engine", "predicted": expected, "measured": built})
        peak = known[subject]["run"]["peak_bytes"]
        rows.append(_run(f"{what}, `hptool run` at 256 × 256", _measured_size(subject), 256, peak))
    return rows


def _measured_size(subject: str) -> ModelSize:
    """Of what was measured at full size: its text encoders have hardly any depth."""
    with tempfile.TemporaryDirectory() as directory:
        write_student(Path(directory) / subject, subject, weights=False)
        return ModelSize(open_model(f"{directory}/{subject}", precision="config"))


def _weights(what: str, model: Model, measured: int) -> dict[str, Any]:
    precision = Precision(bits=4, group_size=64, weights={})
    return {"what": what, "predicted": stored_bytes(model, "transformer", precision), "measured": measured}


def _run(what: str, size: ModelSize, side: int, measured: int) -> dict[str, Any]:
    target = dataclasses.replace(load_profile("cpu-x86"), buckets=((side, side),))
    return {"what": what, "predicted": fit_target(size, target, 4).together, "measured": measured}


def _hptool(command: str) -> list[str]:
    return [sys.executable, "-m", "toolchain", command]


def _succeeded(watched: Watched) -> Watched:
    if watched.status or watched.stopped:
        raise SystemExit(f"a command failed: {watched.errors}")
    return watched


if __name__ == "__main__":
    app()
