"""`hptool compress` as a list of verbs: sample, analyse, plan, prune, distil, save, score."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from toolchain.analysis import Rescorer, analyze, fingerprint, magnitudes, num_units
from toolchain.artifacts import check_new_directory, new_directory, read_json, sha256, write_json
from toolchain.card import write_student_card
from toolchain.checkpoints import Checkpoints
from toolchain.data.feed import Feed, open_feed
from toolchain.data.shards import Precomputed
from toolchain.data.sources import read_prompts
from toolchain.distill import DistillRecipe, InTurn, check_shares, distill_
from toolchain.errors import ToolchainError
from toolchain.families.view import Model, save_model
from toolchain.gate import Gate
from toolchain.geometry import Semantics, Unit
from toolchain.history import HISTORY_FILE, History, HistoryLog, history_to_json
from toolchain.judge import Judge, Stage, write_grid
from toolchain.losses import LossWeights
from toolchain.metrics.velocity import Velocity
from toolchain.optimize import Schedule, take_
from toolchain.pieces import Pieces
from toolchain.plan import (
    PLAN_FILE,
    SENSITIVITY_FILE,
    CompressionPlan,
    RuleName,
    Sensitivity,
    StrengthMode,
    plan_from_json,
    sensitivity_from_json,
    to_json,
    unmeasured,
)
from toolchain.processes import processes
from toolchain.progress import Bar
from toolchain.prune import check_plan, prune
from toolchain.rules import Budget, Options, build_plan, check_budget, format_units
from toolchain.shapes.world import captions
from toolchain.trackers import Tracker
from toolchain.trajectories import States, sample_states, state_bytes
from toolchain.tries import Tries, Try
from toolchain.watch import PICTURES, Watch

REPORT_FILE, REPORT_VERSION = "report.json", 3


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How to decide what goes; the defaults are what did best on `shapes` (docs/method.md)."""

    budget: Budget | None = Budget(ratio=0.25)
    """None for the rule `manual` alone."""
    rule: RuleName = "hpp-iterative"
    options: Options = Options()
    semantics: Semantics = "zero"
    strengths: StrengthMode = "none"
    prompts: int = 16
    """Pictures whose sampling states are measured on."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to do to a model; the defaults fit `shapes` on two cores in five minutes."""

    decision: Decision = Decision()
    steps: int = 500
    """Of distillation; 0 only prunes."""
    learning_rate: float = 7e-4
    warmup: float = 0.05
    """Share of the steps over which the rate rises."""
    cooldown: float = 0.7
    """As `Schedule` takes it, and `ema_decay` and `checkpoint_every`."""
    ema_decay: float | None = None
    checkpoint_every: int = 250
    keep: int = 1
    """Checkpoints, the last ones; the best stays besides."""
    check_every: int | None = None
    """Steps between looks at the student; None for none before the end."""
    pictures: int = 16
    """Painted at each look; 0 for none."""
    gate: Gate | None = None
    """What the student has to be worth. The first look that finds it so ends the training."""
    step_back: float = 0.8
    """Where the student fails the gate, this share of what was removed is removed at the next try."""
    tries: int = 3
    """At most."""
    batch_size: int = 64
    passes: int = 1
    """How often each state of the teacher's sampling is trained on."""
    losses: LossWeights = LossWeights(features=0.0)
    checkpointing: bool = False
    """As `DistillRecipe` takes it, and `accumulate`."""
    accumulate: int = 1
    cache_prefix: bool = False
    """Compute the frozen beginning once for every state and read it from disk from then on."""
    turn: int | None = None
    """Steps after which teacher and student take turns in memory; None keeps both."""
    seed: int = 0
    captions_per_task: int = 40
    """Of ShapesEval; 0 leaves the scores out."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was done and what it cost."""

    model: str
    adapters: tuple[str, ...]
    """LoRA adapters that were baked into it first, each with its scale."""
    student: str
    rule: str
    removed: str
    """As `--remove` takes it."""
    ratio_reached: float
    flops_ratio_reached: float
    stages: tuple[Stage, ...]
    gate: str | None
    """What was asked for."""
    tries: tuple[Try, ...]
    """The last one is the student."""


def needs_prompts(decision: Decision, analysis: Path | None) -> bool:
    """Whether `decide` measures anything: to choose by hand or by chance takes no analysis."""
    if decision.rule == "hpp-iterative":
        return True
    chosen = decision.rule in ("manual", "random") and decision.strengths in ("none", "pwp")
    return analysis is None and not chosen


def decide(
    model: Model,
    decision: Decision,
    prompts: Sequence[str],
    *,
    analysis: Path | None = None,
    work: Path | None = None,
    bar: Bar,
) -> tuple[Sensitivity, CompressionPlan]:
    """Analyse a model as far as the rule needs it, and choose what goes.

    Args:
        model: The teacher.
        decision: How.
        prompts: To measure on; none where `needs_prompts` says so.
        analysis: A finished analysis, to be used in place of a new one.
        work: As `analyze` takes it.
        bar: Starts progress bars.

    Raises:
        ToolchainError: The budget cannot be met, or the analysis is of another model.
    """
    geometry, rule = model.geometry, decision.rule
    if decision.budget is not None:
        check_budget(geometry, decision.semantics, decision.budget, rule=rule, options=decision.options)
    seeds = (decision.seed + 2,)
    if analysis is not None:
        sensitivity = sensitivity_from_json(read_json(analysis))
        if sensitivity.geometry != geometry:
            raise ToolchainError(
                f"{analysis} is an analysis of {sensitivity.model}, another model than {model.source} "
                "or one that was to paint in another size; analyse this one"
            )
    elif not needs_prompts(decision, analysis):
        sensitivity = unmeasured(model.source, geometry, decision.semantics)
    else:
        total = num_units(model, Velocity(), prompts, seeds=seeds)
        sensitivity = analyze(
            model,
            Velocity(),
            prompts,
            seeds=seeds,
            semantics=decision.semantics,
            work=work,
            on_step=bar("measuring what matters", total),
        )
    options, choosing = decision.options, None
    if rule == "hpp-iterative":
        assert decision.budget is not None
        measured = sample(model, prompts, seeds[0], "sampling to measure again", bar)
        choosing = _Choosing(
            Rescorer(model, measured, decision.semantics),
            sensitivity,
            decision.budget,
            bar("choosing what goes", 100),
        )
        options = replace(options, rescore=choosing)
    plan = build_plan(
        sensitivity,
        decision.budget,
        rule=rule,
        options=options,
        mode=decision.strengths,
        semantics=decision.semantics,
    )
    if choosing is not None:
        choosing.show(100)
    return sensitivity, plan


class _Choosing:
    """Measures again, and shows how much of the budget is met, in hundredths."""

    def __init__(
        self, rescore: Rescorer, sensitivity: Sensitivity, budget: Budget, advance: Callable[..., None]
    ) -> None:
        self._rescore, self._sensitivity, self._budget = rescore, sensitivity, budget
        self._advance, self._shown = advance, 0

    def __call__(self, removed: tuple[Unit, ...], units: Sequence[Unit]) -> Mapping[Unit, float]:
        geometry, cost = self._sensitivity.geometry, self._budget.cost
        whole = cost(geometry.size)
        gone = whole - cost(geometry.remaining(removed, self._sensitivity.semantics))
        self.show(min(100, 100 * gone // (whole - self._budget.limit(geometry))))
        return self._rescore(removed, units)

    def show(self, reached: int) -> None:
        """Bring the bar to so many hundredths."""
        for _ in range(self._shown, reached):
            self._advance()
        self._shown = max(self._shown, reached)


def compress_model(
    teacher: Model,
    recipe: Recipe,
    output: Path,
    *,
    prompts: Path | None = None,
    data: Precomputed | None = None,
    analysis: Path | None = None,
    plan: CompressionPlan | None = None,
    trackers: Sequence[str] = (),
    bar: Bar,
    say: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Write a student of a model, with its plan, the analysis behind it, its history and a report.

    What is finished lies in `OUTPUT.work` until the student is written, so that the same call made again
    after an interruption goes on from there.

    Args:
        teacher: Left as it is, save the precision of what it shares with its student.
        recipe: What to do.
        output: A new directory.
        prompts: Text file with a prompt a line; None takes the captions of the data, or of the model's own
            world.
        data: To distil on; None has the teacher paint prompts.
        analysis: A finished analysis, to be used in place of a new one.
        plan: Made before; None decides as the recipe says.
        trackers: By the names accelerate has for them; those that write files do so in `OUTPUT.logs`.
        bar: Starts progress bars.
        say: Called with what a person will want to know before the end.

    Raises:
        ToolchainError: Something asked for cannot be had; nothing has been written then.
    """
    here = processes()
    here.first(lambda: check_new_directory(output))
    if recipe.steps:
        rests = recipe.cache_prefix or recipe.turn is not None
        check_shares(_lessons(recipe), recipe.batch_size, rests=rests)
    if here.zero is not None and recipe.steps:
        here.zero.check(
            train_batch_size=recipe.batch_size,
            train_micro_batch_size_per_gpu=recipe.batch_size / (here.number * recipe.accumulate),
            gradient_accumulation_steps=recipe.accumulate,
            gradient_clipping=Schedule.clip_norm,
        )
    work = output.with_name(f"{output.name}.work")
    sets = prompt_sets(teacher, recipe, prompts, data)
    taught: Feed | None = None
    if data is None:
        _require_memory(teacher, len(sets.taught))
    else:
        taught = open_feed(data, teacher, without=sets.judged)
        teacher = replace(teacher, texts=data.texts)
    settings = _settings(teacher, recipe.decision, sets, analysis, plan)
    plans = Pieces(work / "plans", settings, work="plans")
    # What was removed by hand is not for us to put back.
    by_hand = plan is not None or recipe.decision.budget is None
    depends = settings | _facts(recipe) | {"data": None if data is None else data.digest()}
    tries = Tries(work, depends, gate=recipe.gate, most=1 if by_hand else recipe.tries)

    def planned() -> tuple[Sensitivity | None, CompressionPlan]:
        if plan is not None:
            check_plan(teacher, plan)
            return None, plan
        name = f"try-{len(tries.made) + 1}"
        if name not in plans:
            decision = _stepped_back(recipe, len(tries.made), teacher)
            pieces = work / "analysis"
            made = decide(teacher, decision, sets.analysed, analysis=analysis, work=pieces, bar=bar)
            plans[name] = {"sensitivity": to_json(made[0]), "plan": to_json(made[1])}
        return sensitivity_from_json(plans[name]["sensitivity"]), plan_from_json(plans[name]["plan"])

    def listening() -> list[Tracker]:
        run = "-".join((output.name, *(f"try-{len(tries.made) + 1}" for _ in tries.made[:1])))
        logs = output.with_name(f"{output.name}.logs")
        return [Tracker(name, run, logs) for name in trackers] if here.is_first else []

    listening()  # before any work, for what it may refuse
    sensitivity, chosen = planned()
    judge = Judge(
        teacher,
        sample(teacher, sets.judged, recipe.seed + 1, "sampling for the check", bar),
        sets.judged,
        gate=recipe.gate,
        captions_per_task=recipe.captions_per_task,
        seed=recipe.seed,
    )
    original = judge("original", teacher, bar)
    while True:
        student, steps, history = prune(teacher, chosen, share_prefix=True), 0, None
        stages = [original, judge("pruned", student, bar)]
        if recipe.steps:
            if taught is None:
                taught = sample(teacher, sets.taught, recipe.seed + 3, "sampling to distil on", bar)
            steps, history, stage = _distil(
                teacher,
                student,
                chosen,
                taught,
                recipe,
                judge=judge,
                place=tries.directory,
                trackers=listening(),
                bar=bar,
            )
            stages.append(stage)
        pictures = tries.directory / PICTURES
        if not tries.add(chosen, steps, stages[-1].gate):
            break
        before = chosen
        sensitivity, chosen = planned()
        say(
            f"the gate {recipe.gate} was not passed ({stages[-1].gate:.4g}): the plan steps back, from "
            f"{before.ratio_reached:.1%} of the parameters removed to {chosen.ratio_reached:.1%}"
        )

    outcome = Outcome(
        model=teacher.source,
        adapters=teacher.adapters,
        student=str(output),
        rule=chosen.rule,
        removed=format_units(chosen.removed),
        ratio_reached=chosen.ratio_reached,
        flops_ratio_reached=chosen.flops_ratio_reached,
        stages=tuple(stages),
        gate=None if recipe.gate is None else str(recipe.gate),
        tries=tuple(tries.made),
    )

    def write() -> None:
        with new_directory(output) as directory:
            fill(directory)
        shutil.rmtree(work, ignore_errors=True)

    def fill(directory: Path) -> None:
        save_model(student, directory)
        write_student_card(teacher, directory)
        write_json(directory / PLAN_FILE, to_json(chosen))
        if sensitivity is not None:
            write_json(directory / SENSITIVITY_FILE, to_json(sensitivity))
        if history is not None:
            write_json(directory / HISTORY_FILE, history_to_json(history))
        if pictures.exists():
            shutil.copytree(pictures, directory / PICTURES)
        facts = asdict(replace(recipe, decision=replace(recipe.decision, options=Options())))
        write_json(
            directory / REPORT_FILE, {"schema_version": REPORT_VERSION, "recipe": facts, **asdict(outcome)}
        )

    here.first(write)
    return outcome


def _lessons(recipe: Recipe) -> DistillRecipe:
    schedule = Schedule(
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        warmup_steps=int(recipe.warmup * recipe.steps),
        cooldown=recipe.cooldown,
        ema_decay=recipe.ema_decay,
        checkpoint_every=recipe.checkpoint_every,
    )
    return DistillRecipe(
        schedule=schedule,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        losses=recipe.losses,
        checkpointing=recipe.checkpointing,
        accumulate=recipe.accumulate,
    )


def _distil(
    teacher: Model,
    student: Model,
    plan: CompressionPlan,
    taught: Feed,
    recipe: Recipe,
    *,
    judge: Judge,
    place: Path,
    trackers: list[Tracker],
    bar: Bar,
) -> tuple[int, History | None, Stage]:
    """Distil a student, and have it be the best that it was."""
    lessons = _lessons(recipe)
    checkpoints = Checkpoints(directory=place / "checkpoints", keep=recipe.keep)
    here = processes()
    log = HistoryLog(place / "history.jsonl") if here.is_first else None
    watch = Watch(
        student=student,
        judge=judge,
        gate=recipe.gate,
        schedule=lessons.schedule,
        batch_size=recipe.batch_size,
        num_pictures=recipe.pictures,
        log=log,
        pictures=place / PICTURES,
        trackers=trackers,
        advance=bar("distilling", recipe.steps, unit="states", each=recipe.batch_size),
    )
    if recipe.check_every and recipe.pictures:
        painted = judge.paint(teacher, recipe.pictures)
        if here.is_first:
            write_grid(place / PICTURES / "original.png", painted)
    with closing(watch):
        steps = distill_(
            teacher,
            student,
            plan,
            taught,
            lessons,
            cache_prefix=place / "prefix.safetensors" if recipe.cache_prefix else None,
            in_turn=None if recipe.turn is None else InTurn(steps=recipe.turn, directory=place),
            checkpoints=checkpoints,
            checks=watch.checks(recipe.check_every) if recipe.check_every else None,
            on_step=watch.step,
        )
    # What was trained is float32; the rest, and with it the student as a whole, is what the teacher is.
    student.pipeline.transformer.to(teacher.pipeline.transformer.dtype).eval()
    stage = judge("distilled", student, bar)
    history = here.first(lambda: None if log is None else log.read(steps))
    best = here.first(checkpoints.best)
    if best is not None and best[0] < watch.harm(stage):
        steps = take_(student.pipeline.transformer, best[1])
        stage = judge("distilled", student, bar)
    return steps, history, stage


def _stepped_back(recipe: Recipe, failed: int, teacher: Model) -> Decision:
    """What to decide after so many plans that removed too much."""
    budget = recipe.decision.budget
    if budget is None or not failed:
        return recipe.decision
    return replace(recipe.decision, budget=budget.eased(recipe.step_back**failed, teacher.geometry))


def _settings(
    teacher: Model, decision: Decision, sets: PromptSets, analysis: Path | None, plan: CompressionPlan | None
) -> dict[str, Any]:
    """What plans depend on, by names a message can use."""
    options = asdict(decision.options) | {"units": format_units(decision.options.units)}
    return {
        "model": teacher.source,
        "weights": fingerprint(magnitudes(teacher)),
        "generation": asdict(teacher.defaults),
        **({} if decision.budget is None else decision.budget.asked),
        "rule": decision.rule,
        **{name: value for name, value in options.items() if name != "rescore"},
        "semantics": decision.semantics,
        "strengths": decision.strengths,
        "decision_seed": decision.seed,
        "prompts": hashlib.sha256("\n".join(sets.analysed).encode()).hexdigest(),
        "analysis": None if analysis is None else sha256(analysis),
        "plan": None if plan is None else format_units(plan.removed),
    }


def _facts(recipe: Recipe) -> dict[str, Any]:
    """What else the outcome of a try depends on."""
    idle = ("decision", "checkpoint_every", "keep", "pictures", "tries")
    return {name: value for name, value in asdict(recipe).items() if name not in idle}


@dataclass(frozen=True, kw_only=True)
class PromptSets:
    """Prompts by what they are for; those to judge on are among no others."""

    judged: list[str]
    analysed: list[str]
    taught: list[str]


def prompt_sets(
    teacher: Model, recipe: Recipe, path: Path | None, data: Precomputed | None = None
) -> PromptSets:
    """Share out the prompts of a file, of what is to be distilled on, or of the model's own world.

    Raises:
        ToolchainError: There is no file, it cannot be read, or holds too few.
    """
    states_per_prompt = teacher.defaults.num_inference_steps * (2 if teacher.guided else 1)
    num_taught = -(-recipe.steps * recipe.batch_size // (recipe.passes * states_per_prompt))
    few = recipe.decision.prompts
    if path is None and data is not None:
        found = [caption for caption in data.texts.rows if caption]
        if len(found) < 2 * few:
            raise ToolchainError(
                f"{data.directory} holds {len(found)} captions; at least {2 * few} are needed to measure and "
                "to judge on: lower --num-prompts, or give others: --prompts FILE"
            )
        order = np.random.default_rng(recipe.seed).permutation(len(found))
        chosen = [found[index] for index in order[: 2 * few]]
        return PromptSets(judged=chosen[:few], analysed=chosen[few:], taught=[])
    if path is None:
        _check_world(teacher)
        unseen, seen = captions(held_out=True, seed=recipe.seed), captions(held_out=False, seed=recipe.seed)
        return PromptSets(
            judged=[caption.text for caption in islice(unseen, few)],
            analysed=[caption.text for caption in islice(seen, few)],
            taught=[caption.text for caption in islice(seen, num_taught)],
        )
    lines = read_prompts(path, 2 * few)
    rest = lines[few:]
    return PromptSets(
        judged=lines[:few],
        analysed=rest[:few],
        taught=[rest[index % len(rest)] for index in range(num_taught)],
    )


def _require_memory(teacher: Model, num_taught: int) -> None:
    needed, free = state_bytes(teacher, num_taught), psutil.virtual_memory().available
    if needed > free:
        raise ToolchainError(
            f"the states of {num_taught:,} paintings to distil on take {needed / 1e9:.1f} GB of memory while "
            f"they are made, and {free / 1e9:.1f} are free; have them on disk: hptool precompute MODEL "
            "PROMPTS.txt --output DIR, and --data DIR here. Or take fewer --steps, or a smaller --batch-size"
        )


def analysis_prompts(model: Model, path: Path | None, number: int, *, seed: int) -> list[str]:
    """The first prompts of a file, or captions of the model's own world.

    Raises:
        ToolchainError: There is no file, it cannot be read, or holds too few.
    """
    if path is None:
        _check_world(model)
        return [caption.text for caption in islice(captions(held_out=False, seed=seed), number)]
    return read_prompts(path, number)[:number]


def _check_world(model: Model) -> None:
    if model.world is None:
        raise ToolchainError(
            f"{model.source} is not of the shapes world, so what to prompt it with is not known here; "
            "give a text file with one prompt a line: --prompts FILE"
        )


def sample(model: Model, prompts: Sequence[str], seed: int, name: str, bar: Bar) -> States:
    """`sample_states` with a progress bar."""
    batch_size = 32
    advance = bar(name, -(-len(prompts) // batch_size) * model.defaults.num_inference_steps)
    return sample_states(model, list(prompts), seed=seed, batch_size=batch_size, on_step=advance)
