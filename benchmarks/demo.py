"""The end of `make demo`: what compression did to the built-in model, as a table and as pictures."""

from __future__ import annotations

import platform
import statistics
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import torch
from rich.console import Console
from rich.table import Table

from deploy.pipeline import EdgePipeline
from report.measure import torch_step_ms
from report.pictures import draw_grid
from toolchain.artifacts import read_json, write_json
from toolchain.compress import REPORT_FILE
from toolchain.evaluate import Painter, evaluate_shapes
from toolchain.families import Model, open_model
from toolchain.plan import PLAN_FILE, plan_from_json
from toolchain.prune import prune

PROMPTS = [
    "a red circle",
    "a circle and a square",
    "three yellow triangles",
    "a purple square",
    "a blue square left of a red triangle",
    "a green triangle above a black circle",
    "a yellow circle and a blue triangle",
    "four black squares",
]


def main(directory: Path = Path("demo")) -> None:
    """Compare original, pruned, distilled and INT4 models; writes `table.json` and `grid.png`."""
    report = read_json(directory / "student" / REPORT_FILE)
    recipe = report["recipe"]
    plan = plan_from_json(read_json(directory / "student" / PLAN_FILE))
    original, distilled = open_model(report["model"]), open_model(str(directory / "student"))
    edges = {
        f"distilled, INT4 on {name}": EdgePipeline.open(directory / "bundle", runtime=runtime)
        for name, runtime in (("onnxruntime", "onnxruntime-cpu"), ("OpenVINO", "openvino"))
    }
    painters: dict[str, Painter] = {
        "original": original,
        "pruned": prune(original, plan),
        "distilled": distilled,
        **edges,
    }
    milliseconds = _step_ms(painters)
    rows = []
    for stage, name in zip(report["stages"], painters, strict=False):
        rows.append(
            {
                "model": name,
                "parameters": stage["num_parameters"],
                "transformer_bytes": stage["transformer_bytes"],
                "score": stage["score"]["mean"],
                "standard_error": stage["score"]["standard_error"],
                "ms_per_step": milliseconds[name],
            }
        )
    for name, edge in edges.items():
        score = evaluate_shapes(edge, num_per_task=recipe["captions_per_task"], seed=recipe["seed"])
        rows.append(
            {
                "model": name,
                "parameters": rows[-1]["parameters"],
                "transformer_bytes": _transformer_bytes(edge),
                "score": score.mean,
                "standard_error": score.standard_error,
                "ms_per_step": milliseconds[name],
            }
        )
    machine = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "openvino": openvino.__version__,
    }
    table = {
        "schema_version": 1,
        "captions_per_task": recipe["captions_per_task"],
        "machine": machine,
        "rows": rows,
    }
    write_json(directory / "table.json", table)
    noise = np.random.default_rng(0).standard_normal((len(PROMPTS), *original.latent_shape), dtype=np.float32)
    painted = {name: painter.paint(PROMPTS, noise) for name, painter in painters.items()}
    draw_grid(PROMPTS, painted).save(directory / "grid.png")
    _show(rows, machine, directory)


def _step_ms(painters: dict[str, Painter]) -> dict[str, float]:
    """Median of one guided sampling step of one picture; they take turns, so none has all slow minutes."""
    found: dict[str, list[float]] = {name: [] for name in painters}
    for _ in range(10):
        for name, painter in painters.items():
            if isinstance(painter, Model):
                found[name].append(torch_step_ms(painter, PROMPTS[:1]).p50)
            else:
                assert isinstance(painter, EdgePipeline)
                painter(PROMPTS[0])  # as the others do: another runtime has just had the caches
                found[name].append(statistics.median(painter(PROMPTS[0]).timings_ms["steps"]))
    return {name: statistics.median(values) for name, values in found.items()}


def _transformer_bytes(edge: EdgePipeline) -> int:
    """Bytes of the files that the variant in use reads for its transformer."""
    files = edge.bundle.manifest.files
    return sum(files[name].bytes for name in (edge.variant.path, "transformer/weights.data"))


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _show(rows: list[dict[str, object]], machine: dict[str, object], directory: Path) -> None:
    first = rows[0]
    table = Table(title=f"{machine['processor']}, {machine['threads']} threads")
    for heading in ("model", "parameters", "transformer MB", "ShapesEval", "ms per step"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in rows:
        size = float(str(row["transformer_bytes"]))
        table.add_row(
            str(row["model"]),
            f"{row['parameters']:,}",
            f"{size / 1e6:.2f} ({size / float(str(first['transformer_bytes'])):.2f})",
            f"{row['score']:.3f} ± {row['standard_error']:.3f}",
            f"{row['ms_per_step']:.1f}",
        )
    console = Console()
    console.print(table)
    console.print(f"Pictures: {directory / 'grid.png'}   Numbers: {directory / 'table.json'}")


if __name__ == "__main__":
    main()
