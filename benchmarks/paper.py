"""The paper's table beside ours, for the same geometries: docs/paper.md.

    python -m benchmarks.paper compute     # into benchmarks/results/paper.json, from configurations alone
    python -m benchmarks.paper table       # writes docs/paper.md

Memory and FLOPs of published geometries are exact and need no weights. Quality is of `shapes`, as
benchmarks/quality.py measured it. The paper's own figures are quoted.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import typer

from export.components import Precision, num_tokens
from export.fit import ModelSize
from export.liveness import activation_bytes
from export.space import stored_bytes
from toolchain.artifacts import read_json, write_json
from toolchain.families import Model, open_model
from toolchain.rules import parse_units

app = typer.Typer(add_completion=False, help=__doc__)

RESULTS = Path(__file__).parent / "results" / "paper.json"
QUALITY = RESULTS.with_name("quality.json")
SPEED = RESULTS.with_name("gpu_speed.json")
PAGE = Path(__file__).parents[1] / "docs" / "paper.md"
GIB = 2**30
GROUP_SIZE = 64

MODELS = {
    "SD3.5-Large-Turbo": ("stabilityai/stable-diffusion-3.5-large-turbo", "25-28,31-34"),
    "FLUX.1-schnell": ("black-forest-labs/FLUX.1-schnell", "11-13,15-17,44-49,51-55"),
}
"""Hub id, and the blocks that the pruned one lacks: the paper's for SD3.5; for FLUX.1, whose blocks the paper
does not name, as many."""
STAGES = {"original": 16, "original, INT4": 4, "pruned": 16, "pruned, INT4": 4}
_IN_SPEED = {
    "original": "original, bfloat16, torch",
    "pruned": "pruned, bfloat16, torch",
    "pruned, INT4": "pruned, INT4, onnxruntime",
}
"""Rows of benchmarks/gpu_speed.py."""
PAPER = {
    "SD3.5-Large-Turbo": {
        "original": {"memory": 15.8, "ms": 823, "geneval": 0.71, "hpsv2": 30.29},
        "pruned": {"geneval": 0.71, "hpsv2": 28.97},
        "pruned, INT4": {"memory": 3.56, "ms": 593, "geneval": 0.69, "hpsv2": 28.15},
    },
    "FLUX.1-schnell": {
        "original": {"memory": 22.6, "ms": 756, "geneval": 0.66, "hpsv2": 29.71},
        "pruned, INT4": {"memory": 4.44, "ms": 469, "geneval": 0.64, "hpsv2": 28.69},
    },
}
"""GiB at the peak of a forward pass of the transformer alone, milliseconds on an A6000, and scores."""


@app.command()
def compute() -> None:
    """Count what the published geometries take; needs no weights and no network."""
    rows: dict[str, dict[str, Any]] = {}
    for name, (source, removed) in MODELS.items():
        original = open_model(source, precision="config")
        pruned = original.without_units(parse_units(removed, original.geometry))
        whole = original.geometry.size
        rows[name] = {"removed": removed, "other_parts": _other_parts(original)}
        for model, stages in (
            (original, ("original", "original, INT4")),
            (pruned, ("pruned", "pruned, INT4")),
        ):
            geometry, activations = model.geometry, _activations(model)
            for stage in stages:
                rows[name][stage] = {
                    "parameters": geometry.size.parameters,
                    "flops_share": geometry.size.flops / whole.flops,
                    "transformer_bytes": _stored(model, "transformer", STAGES[stage]),
                    "activation_bytes": activations,
                }
    write_json(RESULTS, {"schema_version": 1, "group_size": GROUP_SIZE, "models": rows})


def _stored(model: Model, part: str, bits: Any) -> int:
    return stored_bytes(model, part, Precision(bits=bits, group_size=GROUP_SIZE, weights={}))


def _other_parts(model: Model) -> dict[str, dict[str, int]]:
    """Bytes of the text encoders and the autoencoder, by the bits that are asked for."""
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "vae")
    there = [name for name in names if getattr(model.pipeline, name, None) is not None]
    return {name: {str(bits): _stored(model, name, bits) for bits in (16, 4)} for name in there}


def _activations(model: Model) -> int:
    """Of one forward pass in 16 bits at the default size, attention in one piece, as torch and engines do."""
    defaults = model.defaults
    graph = ModelSize(model).transformer(1, defaults.height, defaults.width, num_tokens(model))
    return activation_bytes(graph, fused_attention=True) // 2


@app.command()
def table() -> None:
    """Write docs/paper.md."""
    PAGE.write_text(page(read_json(RESULTS), read_json(QUALITY)["cells"], read_json(SPEED)), encoding="utf-8")


def page(results: dict[str, Any], cells: list[dict[str, Any]], on_a_gpu: dict[str, Any]) -> str:
    """The text of docs/paper.md."""
    on_gpu, speed = on_a_gpu["machine"], on_a_gpu["rows"]
    lines = [
        "# Beside the paper",
        "",
        "Made by `python -m benchmarks.paper table`. Each column says where its numbers are from: *computed*",
        "by `python -m benchmarks.paper compute` from the published configurations, exact to the byte for",
        "weights; *quoted* from HierarchicalPrune (AAAI 2026). The paper's memory is the peak of one forward",
        "pass of the transformer alone, in GiB, batch 1, 1024 × 1024, bfloat16 or NF4; ours is weights and",
        f"activations of that pass, in 16 bits or INT4 with groups of {results['group_size']}. The paper's",
        "latencies are of an A6000, ours of a step of PyTorch or, in INT4, of onnxruntime on one",
        f"{on_gpu['gpu']}, *measured* by `python -m benchmarks.gpu_speed measure` ([all](gpu.md)), as its",
        "memory was.",
        "",
    ]
    for name, found in results["models"].items():
        others = {bits: sum(part[bits] for part in found["other_parts"].values()) for bits in ("16", "4")}
        first = _peak(found["original"])
        lines += [f"## {name}, without blocks {found['removed']}", ""]
        lines += _row(
            "", "parameters, computed", "FLOPs, computed", "weights GiB, computed",
            "peak GiB, computed", "peak GiB, measured", "peak GiB, quoted", "whole pipeline GiB, computed",
            "ms, measured", "ms, quoted", "GenEval, quoted", "HPSv2, quoted",
        ) + _row(*["---"] * 12)  # fmt: skip
        for stage, bits in STAGES.items():
            ours, theirs = found[stage], PAPER[name].get(stage, {})
            step, steps = (
                speed.get(f"{name}: {_IN_SPEED.get(stage)}"),
                speed[f"{name}: {_IN_SPEED['original']}"],
            )
            quoted, start = theirs.get("memory"), PAPER[name]["original"]["memory"]
            pipeline = ours["transformer_bytes"] + others[str(bits)]
            lines += _row(
                stage,
                f"{ours['parameters'] / 1e9:.2f} B",
                f"{ours['flops_share']:.0%}",
                f"{ours['transformer_bytes'] / GIB:.2f}",
                _beside(_peak(ours) / GIB, first / GIB, 2),
                "-" if step is None else _beside(step["gpu_bytes"] / GIB, steps["gpu_bytes"] / GIB, 2),
                "-" if quoted is None else _beside(quoted, start, 2),
                f"{pipeline / GIB:.2f}",
                "-"
                if step is None
                else _beside(1e3 * step["seconds_per_step"], 1e3 * steps["seconds_per_step"], 0),
                "-" if "ms" not in theirs else _beside(theirs["ms"], PAPER[name]["original"]["ms"], 0),
                *(str(theirs.get(key, "-")) for key in ("geneval", "hpsv2")),
            )
        lines.append("")
    lines += [
        "The whole pipeline is the weights of all parts in a bundle: T5 is rounded as the transformer is,",
        "the other text encoders and the decoder keep 16 bits. INT4 alone, which the paper does not list, is",
        "most of the memory; removing blocks is what can save time.",
        "",
        "## Quality, on `shapes`",
        "",
        "Measured by `python -m benchmarks.quality run` ([all](quality.md)): ShapesEval, mean ± standard",
        "deviation over seeds. GenEval and HPSv2 need published weights, which were not at hand.",
        "",
    ]
    lines += _row("", "before INT4, measured", "after INT4, measured", "seeds") + _row(*["---"] * 4)
    wanted = {
        "original": ("original", 0.0),
        "the paper's method (HPP, PWP, SGDistill), 20 %": ("HPP + PWP + SGDistill", 0.2),
        "the default, 20 %": ("ours", 0.2),
        "the default, 30 %": ("ours", 0.3),
    }
    for title, (method, ratio) in wanted.items():
        rows = [
            cell
            for cell in cells
            if cell["method"] == method and cell["ratio"] == ratio and cell["equal"] == "steps"
        ]
        lines += _row(title, *(_spread(rows, key) for key in ("student", "student_int4")), str(len(rows)))
    return "\n".join(lines) + "\n"


def _beside(value: float, first: float, digits: int) -> str:
    return f"{value:.{digits}f} ({value / first - 1:+.1%})"


def _peak(row: dict[str, Any]) -> int:
    return int(row["transformer_bytes"] + row["activation_bytes"])


def _spread(rows: list[dict[str, Any]], key: str) -> str:
    scores = [row[key]["score"] for row in rows]
    return f"{statistics.mean(scores):.3f} ± {statistics.stdev(scores):.3f}"


def _row(*cells: str) -> list[str]:
    return [f"| {' | '.join(cells)} |"]


if __name__ == "__main__":
    app()
