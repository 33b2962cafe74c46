"""`hptool compress` as a list of verbs: sample, analyse, plan, prune, distil, save, score."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

from toolchain.analysis import Rescorer, analyze, num_units, velocity_errors
from toolchain.artifacts import check_new_directory, new_directory, read_json, write_json
from toolchain.card import write_student_card
from toolchain.distill import DistillRecipe, InTurn, distill_
from toolchain.errors import ToolchainError
from toolchain.evaluate import ShapesScore, evaluate_shapes, num_batches
from toolchain.families.view import Model, save_model
from toolchain.geometry import Semantics, Unit
from toolchain.losses import LossWeights
from toolchain.metrics.velocity import Velocity
from toolchain.optimize import Schedule
from toolchain.plan import (
    PLAN_FILE,
    SENSITIVITY_FILE,
    CompressionPlan,
    RuleName,
    Sensitivity,
    StrengthMode,
    sensitivity_from_json,
    to_json,
    unmeasured,
)
from toolchain.progress import Bar
from toolchain.prune import check_plan, prune
from toolchain.rules import Budget, Options, build_plan, check_budget, format_units
from toolchain.shapes.world import captions
from toolchain.trajectories import States, sample_states

REPORT_FILE = "report.json"


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
    batch_size: int = 64
    passes: int = 1
    """How often each state of the teacher's sampling is trained on."""
    losses: LossWeights = LossWeights(features=0.0)
    checkpointing: bool = False
    """As `DistillRecipe` takes it."""
    cache_prefix: bool = False
    """Compute the frozen beginning once for every state and read it from disk from then on."""
    turn: int | None = None
    """Steps after which teacher and student take turns in memory; None keeps both."""
    seed: int = 0
    captions_per_task: int = 40
    """Of ShapesEval; 0 leaves the scores out."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The model after one stage."""

    name: str
    num_parameters: int
    transformer_bytes: int
    """As stored."""
    velocity_error: float
    """Mean relative squared error against the teacher, on states neither planned nor trained on."""
    score: ShapesScore | None
    """None where the model is of another world, or no score was asked for."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was done and what it cost."""

    model: str
    student: str
    rule: str
    removed: str
    """As `--remove` takes it."""
    ratio_reached: float
    flops_ratio_reached: float
    stages: tuple[Stage, ...]


def decide(
    model: Model, decision: Decision, prompts: Sequence[str], *, analysis: Path | None = None, bar: Bar
) -> tuple[Sensitivity, CompressionPlan]:
    """Analyse a model as far as the rule needs it, and choose what goes.

    Args:
        model: The teacher.
        decision: How.
        prompts: To measure on.
        analysis: A finished analysis, to be used in place of a new one.
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
    elif rule in ("manual", "random") and decision.strengths in ("none", "pwp"):
        sensitivity = unmeasured(model.source, geometry, decision.semantics)
    else:
        total = num_units(model, Velocity(), prompts, seeds=seeds)
        sensitivity = analyze(
            model,
            Velocity(),
            prompts,
            seeds=seeds,
            semantics=decision.semantics,
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
    analysis: Path | None = None,
    plan: CompressionPlan | None = None,
    bar: Bar,
) -> Outcome:
    """Write a student of a model, with its plan, the analysis behind it and a report.

    The state of distillation lies in `OUTPUT.work` until the student is written, so that the same call made
    again after an interruption goes on from there.

    Args:
        teacher: Left as it is, save the precision of what it shares with its student.
        recipe: What to do.
        output: A new directory.
        prompts: Text file with a prompt a line; None takes the captions of the model's own world.
        analysis: A finished analysis, to be used in place of a new one.
        plan: Made before; None decides as the recipe says.
        bar: Starts progress bars.

    Raises:
        ToolchainError: Something asked for cannot be had; nothing has been written then.
    """
    check_new_directory(output)
    sensitivity = None
    sets = prompt_sets(teacher, recipe, prompts)
    if plan is None:
        sensitivity, plan = decide(teacher, recipe.decision, sets.analysed, analysis=analysis, bar=bar)
    check_plan(teacher, plan)
    judged = sample(teacher, sets.judged, recipe.seed + 1, "sampling for the check", bar)
    stages = [_stage("original", teacher, judged, recipe, bar)]

    student = prune(teacher, plan, share_prefix=True)
    stages.append(_stage("pruned", student, judged, recipe, bar))

    work = output.with_name(f"{output.name}.work")
    if recipe.steps:
        taught = sample(teacher, sets.taught, recipe.seed + 3, "sampling to distil on", bar)
        advance = bar("distilling", recipe.steps)
        schedule = Schedule(
            steps=recipe.steps,
            learning_rate=recipe.learning_rate,
            warmup_steps=recipe.steps // 20,
            cooldown=0.7,
        )
        distill_(
            teacher,
            student,
            plan,
            taught,
            DistillRecipe(
                schedule=schedule,
                batch_size=recipe.batch_size,
                seed=recipe.seed,
                losses=recipe.losses,
                checkpointing=recipe.checkpointing,
            ),
            cache_prefix=work / "prefix.safetensors" if recipe.cache_prefix else None,
            in_turn=None if recipe.turn is None else InTurn(steps=recipe.turn, directory=work),
            checkpoint=work / "state.safetensors",
            on_step=lambda _, loss: advance(note=f"loss {loss:.4f}"),
        )
        # What was trained is float32; the rest, and with it the student as a whole, is what the teacher is.
        student.pipeline.transformer.to(teacher.pipeline.transformer.dtype).eval()
        stages.append(_stage("distilled", student, judged, recipe, bar))

    outcome = Outcome(
        model=teacher.source,
        student=str(output),
        rule=plan.rule,
        removed=format_units(plan.removed),
        ratio_reached=plan.ratio_reached,
        flops_ratio_reached=plan.flops_ratio_reached,
        stages=tuple(stages),
    )
    with new_directory(output) as directory:
        save_model(student, directory)
        write_student_card(teacher, directory)
        write_json(directory / PLAN_FILE, to_json(plan))
        if sensitivity is not None:
            write_json(directory / SENSITIVITY_FILE, to_json(sensitivity))
        facts = asdict(replace(recipe, decision=replace(recipe.decision, options=Options())))
        write_json(directory / REPORT_FILE, {"schema_version": 2, "recipe": facts, **asdict(outcome)})
    shutil.rmtree(work, ignore_errors=True)
    return outcome


@dataclass(frozen=True, kw_only=True)
class PromptSets:
    """Prompts by what they are for; those to judge on are among no others."""

    judged: list[str]
    analysed: list[str]
    taught: list[str]


def prompt_sets(teacher: Model, recipe: Recipe, path: Path | None) -> PromptSets:
    """Share out the prompts of a file, or of the model's own world.

    Raises:
        ToolchainError: There is no file, it cannot be read, or holds too few.
    """
    states_per_prompt = teacher.defaults.num_inference_steps * (2 if teacher.guided else 1)
    num_taught = -(-recipe.steps * recipe.batch_size // (recipe.passes * states_per_prompt))
    few = recipe.decision.prompts
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


def read_prompts(path: Path, least: int) -> list[str]:
    """The prompts of a text file, one a line.

    Raises:
        ToolchainError: It cannot be read, or holds too few.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ToolchainError(f"the prompts in {path} cannot be read: {error}") from error
    if len(lines) < least:
        raise ToolchainError(f"{path} holds {len(lines)} prompts; at least {least} are needed")
    return lines


def sample(model: Model, prompts: Sequence[str], seed: int, name: str, bar: Bar) -> States:
    """`sample_states` with a progress bar."""
    batch_size = 32
    advance = bar(name, -(-len(prompts) // batch_size) * model.defaults.num_inference_steps)
    return sample_states(model, list(prompts), seed=seed, batch_size=batch_size, on_step=advance)


def _stage(name: str, model: Model, judged: States, recipe: Recipe, bar: Bar) -> Stage:
    score = None
    if model.world is not None and recipe.captions_per_task:
        advance = bar(f"ShapesEval, {name}", num_batches(recipe.captions_per_task))
        score = evaluate_shapes(
            model,
            num_per_task=recipe.captions_per_task,
            seed=recipe.seed,
            on_batch=advance,
        )
    return Stage(
        name=name,
        num_parameters=model.num_parameters,
        transformer_bytes=model.num_parameters * model.stored_dtype.itemsize,
        velocity_error=float(velocity_errors(model.mmdit, judged).mean()),
        score=score,
    )
