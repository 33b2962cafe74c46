"""What data-aware rounding and mixed widths give: bytes and velocity error of `shapes`, and of it pruned.

    python -m benchmarks.bits

Every row is the same model with its blocks' linears rounded in another way, on the same held-out states,
whose velocities are those of the model before it was rounded. Calibration and harms come from other captions.
"""

from __future__ import annotations

import copy
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import nn

from benchmarks.machine import machine
from export.bits import Weight, assign_bits, num_bytes
from export.calibrate import collect_moments
from export.harm import component_of_weights, rounding_harms
from export.quantize import choose_group_size
from export.rounding import dequantize, quantize_matrix
from toolchain.analysis import Rescorer, velocity_errors
from toolchain.artifacts import write_json
from toolchain.families import Model, open_model
from toolchain.families.mmdit import MMDiT
from toolchain.geometry import Unit
from toolchain.plan import CompressionPlan, strengths, unmeasured
from toolchain.prune import prune
from toolchain.shapes.world import captions
from toolchain.trajectories import States, sample_states

OUTPUT = Path(__file__).parent / "results" / "bits.json"
_SCALED = re.compile(r"(to_[qkv]|add_[qkv]_proj|net\.0\.proj)\.weight$")
"""What follows a norm whose modulation could take the inverse."""

CALIBRATION_PROMPTS, JUDGED_PROMPTS = 24, 8
REMOVED = (
    "7.ff_context,13.ff_context,6.ff_context,8.ff_context,12.ff_context,10.ff_context,4.ff_context,"
    "9.ff_context,5.ff_context,11.ff_context,2.attn"
)
"""Of the pruned model: what `hptool compress --ratio 0.2` removes of `shapes`; it is not trained after it."""


def main(
    seeds: Annotated[int, typer.Option(min=2)] = 3,
    output: Annotated[Path, typer.Option(help="Where the JSON file goes.")] = OUTPUT,
) -> None:
    """Measure, print and write down."""
    teacher = open_model("shapes")
    subjects = {"shapes": teacher, "shapes, pruned": pruned(teacher)}
    found = {name: rows(Subject(model, seeds)) for name, model in subjects.items()}
    subject = Subject(teacher, seeds)
    found["shapes, inputs scaled as AWQ does"] = [
        subject.row(f"INT4, groups of 64, inputs known, power {power:g}", 64, aware=True, bits=4, power=power)
        for power in (0.0, 0.25, 0.5, 0.75)
    ]
    proxies = rank_correlations(subject)
    write_json(
        output,
        {
            "schema_version": 1,
            "machine": machine() | {"threads": torch.get_num_threads()},
            "calibration_prompts": CALIBRATION_PROMPTS,
            "judged_prompts_per_seed": JUDGED_PROMPTS,
            "removed": REMOVED,
            "rank_correlation_with_rounding_one_by_one": proxies,
            "rows": found,
        },
    )
    for name, of in found.items():
        table = Table("rounding", "bytes", "velocity error x 1000", "by seed", title=name)
        for row in of:
            errors = [1000 * error for error in row["velocity_errors"]]
            each = ", ".join(f"{error:.2f}" for error in errors)
            table.add_row(row["name"], f"{row['bytes']:,}", f"{statistics.mean(errors):.2f}", each)
        Console().print(table)
    print("rank correlation with the error of rounding one component at a time:", proxies)


def section(results: dict[str, Any]) -> list[str]:
    """What docs/benchmarks.md says of it."""
    ranks = results["rank_correlation_with_rounding_one_by_one"]
    lines = [
        "Velocity error x 1000 of rounding alone, against the same model before it was rounded, on held-out",
        "states; mean over seeds. MB are those of the blocks' linears, scales included. The pruned model",
        f"lacks {results['removed'].replace(',', ', ')} and is not trained.",
    ]
    for subject, rows in results["rows"].items():
        lines += [
            "",
            f"### {subject}",
            "",
            "| rounding | MB | velocity error x 1000 | by seed |",
            "| --- | --- | --- | --- |",
        ]
        for row in rows:
            errors = [1000 * error for error in row["velocity_errors"]]
            each = ", ".join(f"{error:.2f}" for error in errors)
            lines.append(
                f"| {row['name']} | {row['bytes'] / 1e6:.2f} | {statistics.mean(errors):.2f} | {each} |"
            )
    lines += ["", "Rank correlation with the error of rounding one component at a time:", ""]
    lines += [f"- {name}: {value:.2f}" for name, value in ranks.items()]
    return lines


def pruned(teacher: Model) -> Model:
    """The model without `REMOVED`, untrained."""
    removed = tuple(map(Unit.parse, REMOVED.split(",")))
    nothing = unmeasured(teacher.source, teacher.geometry, "zero")
    plan = CompressionPlan(
        model=teacher.source,
        geometry=teacher.geometry,
        semantics="zero",
        rule="manual",
        removed=removed,
        strength=strengths(nothing, removed, "none"),
        asked={"remove": REMOVED},
    )
    return prune(teacher, plan)


class Subject:
    """A model, what calibration says of it, and the states it is judged on."""

    def __init__(self, model: Model, seeds: int) -> None:
        self.model = model
        prompts = [item.text for item in islice(captions(held_out=False, seed=300), CALIBRATION_PROMPTS)]
        with tempfile.TemporaryDirectory() as scratch:
            self.moments = collect_moments(model, prompts, Path(scratch) / "moments.safetensors", seed=5000)
        self.calibrated = sample_states(model, prompts, seed=6000)
        self.judged = [judged(model, seed) for seed in range(seeds)]
        self.components = component_of_weights(model.mmdit)

    def harms(self, group_size: int) -> list[Weight]:
        """Of all weights."""
        return rounding_harms(self.model, self.moments, self.calibrated, group_size=group_size)

    def row(
        self,
        name: str,
        group_size: int,
        *,
        aware: bool,
        bits: Callable[[str], int] | int,
        power: float = 0.0,
    ) -> dict[str, Any]:
        """Round and judge."""
        view, size = self.rounded(group_size, aware, bits if callable(bits) else lambda _: bits, power)
        errors = [float(velocity_errors(view, states).mean()) for states in self.judged]
        print(f"{name}: {size} bytes, {', '.join(f'{1000 * error:.2f}' for error in errors)}", flush=True)
        return {"name": name, "bytes": size, "velocity_errors": errors}

    def rounded(
        self, group_size: int, aware: bool, bits: Callable[[str], int], power: float = 0.0
    ) -> tuple[MMDiT, int]:
        """The model as it computes once rounded, and the bytes of its blocks' linears.

        With a power above 0 the inputs of `_SCALED` are scaled before rounding by their root mean square to
        it, and back after, which is what folding the inverse into the layer before would compute.
        """
        transformer, size = copy.deepcopy(self.model.pipeline.transformer), 0
        for name, linear in _linears(transformer, self.components):
            weight = linear.weight.detach().T.numpy()
            width = bits(name)
            if width == 16:
                size += 2 * weight.size
                continue
            importance = self.moments.importance(name)
            scale = np.ones(len(weight))
            if power and _SCALED.search(name):
                scale = importance ** (power / 2)
                scale /= np.exp(np.log(scale).mean())
            rounded = quantize_matrix(
                weight * scale.astype(np.float32)[:, None],
                bits=8 if width == 8 else 4,
                group_size=choose_group_size(len(weight), group_size),
                importance=importance / scale**2 if aware else None,
            )
            size += weight.size * width // 8 + rounded.scales.nbytes
            exact = dequantize(rounded.values, rounded.scales) / scale.astype(np.float32)[:, None]
            exact = np.ascontiguousarray(exact.T)
            linear.weight = nn.Parameter(torch.from_numpy(exact), requires_grad=False)
        view = self.model.mmdit
        return type(view)(transformer, guidance_scale=view.guidance_scale), size


def rows(subject: Subject) -> list[dict[str, Any]]:
    """All ways of rounding."""
    found = [
        subject.row(f"{title}{', inputs known' if aware else ''}", group, aware=aware, bits=bits)
        for title, group, bits in (
            ("INT4, groups of 32", 32, 4),
            ("INT4, groups of 64", 64, 4),
            ("INT4, groups of 128", 128, 4),
            ("INT8, groups of 64", 64, 8),
        )
        for aware in (False, True)
    ]
    size = {row["name"]: row["bytes"] for row in found}
    weights = subject.harms(128)
    by_component = [replace(item, unit=subject.components[item.name]) for item in weights]
    for title in ("groups of 64", "groups of 32"):
        budget = size[f"INT4, {title}"]
        for unit, of in (("weight", weights), ("component", by_component)):
            found.append(_mixed(subject, f"4, 8 and 16 bits by {unit}, bytes of {title}", of, budget))
    for share in (1.25, 1.5):
        budget = int(share * size["INT4, groups of 128"])
        found.append(
            _mixed(subject, f"4, 8 and 16 bits by weight, {share:g} x groups of 128", weights, budget)
        )
    return found


def rank_correlations(subject: Subject) -> dict[str, float]:
    """How estimates order the components, against rounding each of them alone and measuring."""
    states = subject.calibrated
    few = slice(0, 96)
    states = replace(
        states,
        latents=states.latents[few],
        timesteps=states.timesteps[few],
        velocities=states.velocities[few],
        prompt_index=states.prompt_index[few],
    )
    units = sorted(set(subject.components.values()))
    gradient, energy, output = (dict.fromkeys(units, 0.0) for _ in range(3))
    for item in subject.harms(128):
        gradient[subject.components[item.name]] += item.error4
    for name, linear in _linears(subject.model.pipeline.transformer, subject.components):
        weight, importance = linear.weight.detach().T.numpy(), subject.moments.importance(name)
        group = choose_group_size(len(weight), 128)
        rounded = quantize_matrix(weight, bits=4, group_size=group, importance=importance)
        energy[subject.components[name]] += rounded.error
        output[subject.components[name]] += float((weight**2 * importance[:, None]).sum())
    removal = Rescorer(subject.model, states, "zero")((), [Unit.parse(unit) for unit in units])
    measured = []
    for unit in units:
        view, _ = subject.rounded(128, True, lambda name: 4 if subject.components[name] == unit else 16)  # noqa: B023
        measured.append(float(velocity_errors(view, states).mean()))
    estimates = {
        "gradients": [gradient[unit] for unit in units],
        "removal times relative error of the outputs": [
            removal[Unit.parse(unit)] * energy[unit] / output[unit] for unit in units
        ],
        "error of the outputs": [energy[unit] for unit in units],
    }
    return {name: float(spearmanr(measured, values)[0]) for name, values in estimates.items()}


def _mixed(subject: Subject, name: str, weights: Sequence[Weight], max_bytes: int) -> dict[str, Any]:
    chosen = assign_bits(weights, max_bytes=max_bytes)
    bits: Mapping[str, int] = {item.name: chosen[item.unit] for item in weights}
    row = subject.row(name, 128, aware=True, bits=lambda weight: bits[weight])
    if row["bytes"] != num_bytes(weights, chosen) or row["bytes"] > max_bytes:
        raise SystemExit(f"{name} takes {row['bytes']} bytes, and {max_bytes} were allowed")
    widths = list(bits.values())
    return row | {"weights_by_bits": {str(width): widths.count(width) for width in (4, 8, 16)}}


def judged(model: Model, seed: int) -> States:
    """Held-out states of the model's own sampling."""
    prompts = [item.text for item in islice(captions(held_out=True, seed=seed), JUDGED_PROMPTS)]
    return sample_states(model, prompts, seed=1000 + seed)


def _linears(module: nn.Module, names: Mapping[str, str]) -> Iterator[tuple[str, nn.Linear]]:
    for name, part in module.named_modules():
        if f"{name}.weight" in names and isinstance(part, nn.Linear):
            yield f"{name}.weight", part


if __name__ == "__main__":
    typer.run(main)
