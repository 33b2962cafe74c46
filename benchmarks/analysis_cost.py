"""What reusing the beginning of the forward pass saves when every part is removed in turn.

    python -m benchmarks.analysis_cost

Removes every block and component of `shapes`, once as `hptool analyze` does and once by running the whole
model anew for each, on the same states and in turn, so that whatever else the machine does is shared.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from toolchain.analysis import Rescorer, removals, velocity_errors
from toolchain.artifacts import write_json
from toolchain.families import open_model
from toolchain.geometry import Geometry, Unit
from toolchain.trajectories import sample_states

OUTPUT = Path(__file__).parent / "results" / "analysis_cost.json"
PROMPTS = ["a red circle left of a blue square", "three yellow triangles"]
REPEATS = 3


def main() -> None:
    """Measure, check that both ways agree, and write it down."""
    model = open_model("shapes")
    view, geometry = model.mmdit, model.geometry
    states = sample_states(model, PROMPTS, seed=0)
    units = [unit for (unit,) in removals(geometry)]
    rescore = Rescorer(model, states, "zero")
    shared, anew = dict[Unit, float](), dict[Unit, float]()
    seconds: dict[str, list[float]] = {"shared": [], "anew": []}
    for _ in range(REPEATS):
        started = time.perf_counter()
        shared |= rescore((), units)
        seconds["shared"].append(time.perf_counter() - started)
        started = time.perf_counter()
        for unit in units:
            anew[unit] = float(velocity_errors(view.without([unit], "zero"), states).mean())
        seconds["anew"].append(time.perf_counter() - started)
    # Rounding differs: the whole model's own error is subtracted on one side and is not quite 0.
    apart = max(abs(shared[unit] - anew[unit]) / max(anew[unit], 1e-3) for unit in units)
    if apart > 1e-3:
        raise SystemExit(f"the two ways differ by {apart:.2g}, relative")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "schema_version": 1,
        "machine": machine() | {"threads": torch.get_num_threads()},
        "model": model.source,
        "removals": len(units),
        "states": len(states),
        "seconds": medians,
        "repeats": seconds,
        "ratio": medians["shared"] / medians["anew"],
        "ratio_by_flops": _by_flops(geometry),
        "largest_relative_difference": apart,
    }
    OUTPUT.parent.mkdir(exist_ok=True)
    write_json(OUTPUT, result)
    table = Table("", "seconds", title=f"{len(units)} removals on {len(states)} states of {model.source}")
    for name, value in medians.items():
        table.add_row(name, f"{value:.2f}")
    table.add_row("ratio", f"{result['ratio']:.3f}")
    table.add_row("ratio by FLOPs", f"{result['ratio_by_flops']:.3f}")
    Console().print(table)


def section(results: dict[str, Any]) -> list[str]:
    """What docs/benchmarks.md says of it."""
    seconds = results["seconds"]
    return [
        f"Removing each of the {results['removals']} parts of `{results['model']}` on {results['states']}",
        f"states, medians of {len(results['repeats']['shared'])}:",
        "",
        "| | seconds | ratio |",
        "| --- | --- | --- |",
        f"| the whole model anew for each | {seconds['anew']:.1f} | 1 |",
        f"| with the shared beginning | {seconds['shared']:.1f} | {results['ratio']:.2f} |",
        f"| the same by FLOPs | | {results['ratio_by_flops']:.2f} |",
    ]


def _by_flops(geometry: Geometry) -> float:
    """The ratio if time were FLOPs; what a removal itself saves is left out on both sides."""
    flops = [block.flops for block in geometry.blocks]
    units = [1 + len(block.components) for block in geometry.blocks]
    shared = geometry.size.flops + sum(count * sum(flops[index:]) for index, count in enumerate(units))
    return shared / (sum(units) * geometry.size.flops)


if __name__ == "__main__":
    main()
