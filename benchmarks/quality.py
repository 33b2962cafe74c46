"""Which way of making a student is the best one: every method at every ratio, on `shapes`.

    python -m benchmarks.quality run         measure what is missing; stop it and start it again at will
    python -m benchmarks.quality table       gather what is there: results/quality.json, docs/quality.md, .png

Every cell is one student of one method, ratio and seed, made and judged by a process of one thread, so that
numbers do not depend on how many cores there are, and kept in a file of its own.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, lru_cache, partial
from itertools import islice, pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.machine import machine
from export.quantize import choose_group_size
from export.rounding import dequantize, quantize_matrix
from toolchain.analysis import Rescorer, analyze, velocity_errors
from toolchain.artifacts import read_json, write_json
from toolchain.distill import DistillRecipe, distill_
from toolchain.evaluate import evaluate_shapes
from toolchain.families import Model, open_model
from toolchain.geometry import Semantics
from toolchain.losses import LossWeights
from toolchain.metrics.velocity import Velocity
from toolchain.optimize import Schedule
from toolchain.plan import (
    CompressionPlan,
    RuleName,
    Sensitivity,
    StrengthMode,
    sensitivity_from_json,
    to_json,
)
from toolchain.prune import prune
from toolchain.rules import Budget, Options, Rescore, build_plan
from toolchain.shapes.world import captions
from toolchain.trajectories import States, sample_states

RESULTS = Path(__file__).parent / "results"
RATIOS = (0.2, 0.3, 0.4)
STEPS, BATCH_SIZE, LEARNING_RATE = 200, 64, 7e-4
NUM_PROMPTS = 600
"""Whose sampling gives the states to train on; each is trained on about once."""
PER_TASK = 40
_PAPER_FEATURES = 1e-4


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a student is made."""

    rule: RuleName
    options: Options = Options()
    strengths: StrengthMode = "none"
    features: float = _PAPER_FEATURES
    """Weight of the feature loss, beside 1 for the velocity's."""
    semantics: Semantics = "zero"
    train: bool = True


ORIGINAL = "original"
METHODS = {
    "bk-sdm": Method(rule="bk-sdm"),
    "koala": Method(rule="koala"),
    "random": Method(rule="random"),
    "HPP": Method(rule="hpp", strengths="pwp", train=False),
    "HPP + PWP": Method(rule="hpp", strengths="pwp"),
    "HPP + PWP + SGDistill": Method(rule="hpp", strengths="sgdistill"),
    "ours": Method(rule="hpp-iterative", features=0.0),
}
"""The last is what `hptool compress` does by default."""
BASE = "bk-sdm"
"""Whose time is the time that all get at equal wall-clock."""
TIMED = ("HPP + PWP", "HPP + PWP + SGDistill", "ours")
"""Methods whose steps do not cost what those of the baselines do."""

VARIANTS = {
    "HPP + PWP, weight as transcribed": Method(
        rule="hpp", strengths="pwp", options=Options(position_weight="paper")
    ),
    "HPP + PWP, no weight": Method(rule="hpp", strengths="pwp", options=Options(position_weight="none")),
    "HPP + PWP, identity": Method(rule="hpp", strengths="pwp", semantics="identity"),
    "HPP, nothing frozen": Method(rule="hpp"),
    "HPP + PWP + SGDistill, binary": Method(rule="hpp", strengths="sgdistill-binary"),
    "ours, untrained": Method(rule="hpp-iterative", train=False),
    "ours, whole blocks": Method(rule="hpp-iterative", options=Options(grain="blocks"), features=0.0),
    "ours, identity": Method(rule="hpp-iterative", semantics="identity", features=0.0),
    "ours + PWP": Method(rule="hpp-iterative", strengths="pwp", features=0.0),
    "ours, graded": Method(rule="hpp-iterative", strengths="graded", features=0.0),
    "ours, with features": Method(rule="hpp-iterative"),
}
"""One choice changed at a time, at `VARIANT_RATIO`."""
VARIANT_RATIO = 0.3
"""Also that of equal time."""

app = typer.Typer(add_completion=False, no_args_is_help=True)


@dataclass(frozen=True)
class Cell:
    """One student to make and to judge."""

    method: str
    ratio: float
    seed: int
    equal: str
    """`steps`, or `time`: that of `BASE` at the same ratio and seed."""

    def path(self, directory: Path) -> Path:
        """Of its file."""
        name = self.method.replace(" + ", "-").replace(", ", "-").replace(" ", "-")
        return directory / f"{name}.{round(100 * self.ratio)}.{self.seed}.{self.equal}.json".lower()


def cells(seeds: int) -> Iterator[Cell]:
    """All of them, one seed after the other, as its students share their states and what was analysed:
    the table, then what some have at equal time, then the variants.
    """
    for seed in range(seeds):
        yield Cell(ORIGINAL, 0.0, seed, "steps")
        yield from (Cell(method, ratio, seed, "steps") for ratio in RATIOS for method in METHODS)
        yield from (Cell(method, VARIANT_RATIO, seed, "time") for method in TIMED)
        yield from (Cell(method, VARIANT_RATIO, seed, "steps") for method in VARIANTS)


class Subject:
    """The teacher and all that students of one seed have in common."""

    def __init__(self, seed: int, directory: Path) -> None:
        self.seed, self._directory = seed, directory
        self._rescore: dict[Semantics, Rescore] = {}
        self.teacher = open_model("shapes")
        held_out = islice(captions(held_out=True, seed=seed), 48)
        self.judged = sample_states(self.teacher, [item.text for item in held_out], seed=1000 + seed)

    @cached_property
    def taught(self) -> States:
        """States to train on."""
        prompts = islice(captions(held_out=False, seed=seed_of("train", self.seed)), NUM_PROMPTS)
        return sample_states(self.teacher, [item.text for item in prompts], seed=3000 + self.seed)

    @cached_property
    def analysed(self) -> tuple[list[str], States]:
        """Prompts to analyse on, and the states that the iterative rule measures on."""
        prompts = [
            item.text for item in islice(captions(held_out=False, seed=seed_of("analysis", self.seed)), 16)
        ]
        return prompts, sample_states(self.teacher, prompts, seed=2000 + self.seed)

    def sensitivity(self, semantics: Semantics) -> Sensitivity:
        """Measured once, by whichever process is first to need it."""
        path = self._directory / f"sensitivity.{semantics}.{self.seed}.json"
        if path.exists():
            return sensitivity_from_json(read_json(path))
        prompts, _ = self.analysed
        found = analyze(self.teacher, Velocity(), prompts, seeds=(2000 + self.seed,), semantics=semantics)
        write_json(path, to_json(found))
        return found

    def rescore(self, semantics: Semantics) -> Rescore:
        """Measures nothing twice: a plan of a larger ratio begins as that of a smaller one does."""
        if semantics not in self._rescore:
            self._rescore[semantics] = cache(Rescorer(self.teacher, self.analysed[1], semantics))
        return self._rescore[semantics]

    def plan(self, method: Method, ratio: float) -> CompressionPlan:
        """What a method decides."""
        options = replace(method.options, seed=self.seed)
        if method.rule == "hpp-iterative":
            options = replace(options, rescore=self.rescore(method.semantics))
        return build_plan(
            self.sensitivity(method.semantics),
            Budget(ratio=ratio),
            rule=method.rule,
            options=options,
            mode=method.strengths,
        )


def seed_of(purpose: str, seed: int) -> int:
    """Other captions for another purpose and another seed."""
    return {"train": 100, "analysis": 200}[purpose] + seed


def measure(subject: Subject, cell: Cell, directory: Path) -> dict[str, Any]:
    """Make the student of a cell and judge it, unless the same one was made by another name."""
    if cell.method == ORIGINAL:
        return {**asdict(cell), **_judge_both(subject, subject.teacher)}
    method = (METHODS | VARIANTS)[cell.method]
    plan = subject.plan(method, cell.ratio)
    twin = _twin(subject, cell)
    if twin is not None and twin.path(directory).exists():
        return read_json(twin.path(directory)) | asdict(cell)
    student = prune(subject.teacher, plan, share_prefix=True)
    steps = 0
    if method.train:
        steps = STEPS
        if cell.equal == "time":
            seconds = step_seconds(subject, directory)
            steps = round(STEPS * seconds[BASE] / seconds[cell.method])
        _distill_(subject, student, plan, method, steps)
    student.pipeline.transformer.eval()
    return {
        **asdict(cell),
        "removed": [str(unit) for unit in plan.removed],
        "parameters_removed": plan.ratio_reached,
        "flops_removed": plan.flops_ratio_reached,
        "steps": steps,
        **_judge_both(subject, student),
    }


def _twin(subject: Subject, cell: Cell) -> Cell | None:
    """One of `METHODS` that differs in how it decides alone, and decides the same."""
    method = (METHODS | VARIANTS)[cell.method]
    for name, other in METHODS.items():
        if name != cell.method and replace(other, options=method.options) == method:
            ours, theirs = (subject.plan(each, cell.ratio) for each in (method, other))
            if set(ours.removed) == set(theirs.removed) and ours.strength == theirs.strength:
                return replace(cell, method=name)
    return None


def _distill_(
    subject: Subject,
    student: Model,
    plan: CompressionPlan,
    method: Method,
    steps: int,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    schedule = Schedule(steps=steps, learning_rate=LEARNING_RATE, warmup_steps=steps // 20, cooldown=0.7)
    recipe = DistillRecipe(
        schedule=schedule,
        batch_size=BATCH_SIZE,
        seed=subject.seed,
        losses=LossWeights(features=method.features),
    )
    distill_(subject.teacher, student, plan, subject.taught, recipe, on_step=on_step)


def step_seconds(subject: Subject, directory: Path) -> dict[str, float]:
    """Median time of a step of `BASE` and of the methods whose steps cost something else, at `VARIANT_RATIO`.

    Measured once for all seeds, the methods taking turns, so that whatever else the machine does is shared.
    """
    path = directory / "seconds.json"
    if not path.exists():
        found: dict[str, list[float]] = {name: [] for name in (BASE, *TIMED)}
        for _ in range(4):
            for name, values in found.items():
                method, marks = METHODS[name], list[float]()
                plan = subject.plan(method, VARIANT_RATIO)
                student = prune(subject.teacher, plan, share_prefix=True)
                _distill_(subject, student, plan, method, 6, partial(_mark, marks))
                values += [end - start for start, end in pairwise(marks)]
        write_json(path, {name: statistics.median(values) for name, values in found.items()})
    medians: dict[str, float] = read_json(path)
    return medians


def _mark(marks: list[float], *_: object) -> None:
    marks.append(time.perf_counter())


def _judge_both(subject: Subject, model: Model) -> dict[str, Any]:
    return {"student": judge(subject, model), "student_int4": judge(subject, rounded(model))}


def judge(subject: Subject, model: Model) -> dict[str, Any]:
    """Velocity error on held-out trajectories, and ShapesEval."""
    score = evaluate_shapes(model, num_per_task=PER_TASK, seed=subject.seed)
    return {
        "velocity_error": float(velocity_errors(model.mmdit, subject.judged).mean()),
        "score": score.mean,
        "tasks": score.tasks,
    }


def rounded(model: Model) -> Model:
    """The same model with its blocks' linears rounded to INT4 as `hptool export` rounds them."""
    transformer = copy.deepcopy(model.pipeline.transformer)
    for name, module in transformer.named_modules():
        if "transformer_blocks." in name and isinstance(module, torch.nn.Linear):
            weight = module.weight.detach().T.numpy()
            group = choose_group_size(weight.shape[0], 64)
            rounded_ = quantize_matrix(weight, bits=4, group_size=group)
            exact = dequantize(rounded_.values, rounded_.scales)
            module.weight = torch.nn.Parameter(torch.from_numpy(exact).T.contiguous(), requires_grad=False)
    parts = {**model.pipeline.components, "transformer": transformer}
    pipeline = type(model.pipeline)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return replace(model, pipeline=pipeline)


@app.command()
def run(
    directory: Annotated[Path, typer.Option(help="Where the cells are kept.")] = RESULTS / "quality",
    seeds: Annotated[int, typer.Option(min=2)] = 3,
    processes: Annotated[int, typer.Option(min=1, help="Default: one for each core.")] = os.cpu_count() or 1,
) -> None:
    """Measure every cell that is missing."""
    torch.set_num_threads(1)
    directory.mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in cells(seeds) if not cell.path(directory).exists()]
    if any(cell.equal == "time" for cell in missing):  # what steps take is measured while nothing else runs
        step_seconds(_subject(0, directory), directory)
        _subject.cache_clear()
    pool = ProcessPoolExecutor(
        processes, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    with pool:
        for line in pool.map(partial(_fill, directory), missing):
            print(line, flush=True)


def _fill(directory: Path, cell: Cell) -> str:
    """Measure a cell, and say in a line what came out."""
    found = measure(_subject(cell.seed, directory), cell, directory)
    write_json(cell.path(directory), found | {"machine": machine()})
    return f"{cell}: {found['student']['score']:.3f}, INT4 {found['student_int4']['score']:.3f}"


@lru_cache(maxsize=1)
def _subject(seed: int, directory: Path) -> Subject:
    return Subject(seed, directory)


@app.command()
def table(
    directory: Annotated[Path, typer.Option(help="Where the cells are kept.")] = RESULTS / "quality",
    output: Annotated[Path, typer.Option(help="Where the JSON file goes.")] = RESULTS / "quality.json",
    docs: Annotated[Path, typer.Option(help="Where the page and its plot go.")] = RESULTS.parent.parent
    / "docs",
) -> None:
    """Gather all cells there are."""
    found = [read_json(path) for path in sorted(directory.glob("*.steps.json"))]
    found += [read_json(path) for path in sorted(directory.glob("*.time.json"))]
    write_json(output, {"schema_version": 1, "settings": _settings(), "cells": found})
    groups: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for cell in found:
        groups.setdefault((cell["method"], cell["ratio"], cell["equal"]), []).append(cell)
    page = _page(groups)
    (docs / "quality.md").write_text(page, encoding="utf-8")
    _plot(groups, docs / "quality.png")
    print(page)


def _settings() -> dict[str, object]:
    return {
        "steps": STEPS,
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "prompts": NUM_PROMPTS,
        "captions_per_task": PER_TASK,
        "equal_time": f"that of {BASE} for its {STEPS} steps, one thread",
    }


Groups = dict[tuple[str, float, str], list[dict[str, Any]]]


def _page(groups: Groups) -> str:
    machines = {
        f"{cell['machine']['processor']}, torch {cell['machine']['torch']}"
        for cells_ in groups.values()
        for cell in cells_
    }
    seeds = sorted({cell["seed"] for cells_ in groups.values() for cell in cells_})
    lines = [
        "# Quality on `shapes`, method by method",
        "",
        "Made by `python -m benchmarks.quality table` of what `python -m benchmarks.quality run` measured.",
        "",
        f"One thread a student; {', '.join(sorted(machines))}. Seeds {', '.join(map(str, seeds))}:",
        "each has prompts, noise, batches and evaluation captions of its own.",
        f"{STEPS} steps of {BATCH_SIZE} states unless it says otherwise, learning rate {LEARNING_RATE:g}.",
        f"ShapesEval over {6 * PER_TASK} captions, mean ± standard deviation over seeds;",
        "velocity error x 1000 on 48 held-out trajectories, of what the sampler follows;",
        "INT4 as `hptool export` rounds.",
    ]
    for ratio in RATIOS:
        lines += ["", f"## {ratio:.0%} of the parameters", "", *_table((ORIGINAL, *METHODS), groups, ratio)]
    title = f"At equal wall-clock, {VARIANT_RATIO:.0%} of the parameters: the time that {BASE} takes"
    lines += ["", f"## {title} for {STEPS} steps", ""]
    lines += ["The other baselines take the same time for the same steps: theirs are the numbers above.", ""]
    lines += _table(TIMED, groups, VARIANT_RATIO, "time")
    lines += ["", f"## One choice changed, {VARIANT_RATIO:.0%} of the parameters", ""]
    lines += ["Methods that decide the same have one student, which was made once.", ""]
    lines += _table((*METHODS, *VARIANTS), groups, VARIANT_RATIO)
    lines += ["", "![ShapesEval and velocity error by ratio](quality.png)", ""]
    return "\n".join(lines)


def _table(names: Iterable[str], groups: Groups, ratio: float, equal: str = "steps") -> list[str]:
    heads = ("method", "ShapesEval", "after INT4", "velocity error", "removed", "steps", "seeds")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in names:
        key = (ORIGINAL, 0.0, "steps") if name == ORIGINAL else (name, ratio, equal)
        if key in groups:
            lines.append(f"| {' | '.join((name, *_texts(groups[key])))} |")
    return lines


def _texts(cells_: list[dict[str, Any]]) -> list[str]:
    removed = [(cell.get("parameters_removed", 0.0), cell.get("flops_removed", 0.0)) for cell in cells_]
    parameters, flops = (statistics.mean(column) for column in zip(*removed, strict=True))
    return [
        _mean(cell["student"]["score"] for cell in cells_),
        _mean(cell["student_int4"]["score"] for cell in cells_),
        _mean((1000 * cell["student"]["velocity_error"] for cell in cells_), digits=1),
        f"{parameters:.0%} ({flops:.0%} FLOPs)",
        f"{statistics.mean(cell.get('steps', 0) for cell in cells_):.0f}",
        str(len(cells_)),
    ]


def _mean(values: Iterable[float], digits: int = 3) -> str:
    found = list(values)
    spread = f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.{digits}f}{spread}"


def _plot(groups: Groups, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    panels = (("student", "score", "ShapesEval"), ("student_int4", "score", "ShapesEval, INT4"),
              ("student", "velocity_error", "velocity error"))  # fmt: skip
    original = groups.get((ORIGINAL, 0.0, "steps"), [])
    for axis, (which, what, title) in zip(axes, panels, strict=True):
        for number, name in enumerate(METHODS):
            points = {ratio: groups.get((name, ratio, "steps"), []) for ratio in RATIOS}
            values = {
                ratio: [cell[which][what] for cell in cells_] for ratio, cells_ in points.items() if cells_
            }
            axis.errorbar(
                [ratio + 0.003 * (number - 3) for ratio in values],
                [statistics.mean(column) for column in values.values()],
                [statistics.stdev(column) if len(column) > 1 else 0.0 for column in values.values()],
                marker="osD^vP*"[number],
                linewidth=2.5 if name == "ours" else 1.2,
                capsize=2,
                label=name,
            )
        if what == "score" and original:
            axis.axhline(
                statistics.mean(cell[which][what] for cell in original),
                color="0.5",
                linestyle=":",
                label="original",
            )
        else:
            axis.set_yscale("log")
        axis.set(title=title, xlabel="share of the parameters to remove", xticks=RATIOS)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    app()
