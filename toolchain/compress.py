"""`hptool compress` as a list of verbs: sample, analyse, plan, prune, distil, save, score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from toolchain import plan as planning
from toolchain.analysis import analyze, velocity_errors
from toolchain.artifacts import check_new_directory, new_directory, write_json
from toolchain.distill import distill_
from toolchain.errors import ToolchainError
from toolchain.evaluate import ShapesScore, evaluate_shapes, num_batches
from toolchain.families.sd3 import block_parameters
from toolchain.families.view import Model, open_model, save_model_
from toolchain.optimize import Schedule
from toolchain.prune import freeze_preserved_, prune
from toolchain.shapes.world import captions
from toolchain.trajectories import States, sample_states

Bar = Callable[[str, int], Callable[..., None]]
"""Starts a progress bar of a name and a length, and returns what advances it."""

SENSITIVITY_FILE, REPORT_FILE = "sensitivity.json", "report.json"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to do to a model; the defaults fit `shapes` on two cores in five minutes."""

    ratio: float = 0.25
    """Share of the transformer's parameters to remove, at least."""
    steps: int = 500
    """Of distillation; 0 only prunes."""
    learning_rate: float = 1.5e-3
    batch_size: int = 64
    passes: int = 2
    """How often each state of the teacher's sampling is trained on."""
    analysis_prompts: int = 16
    """Pictures whose sampling states the blocks' contribution is measured on."""
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
    removed_blocks: tuple[int, ...]
    ratio_reached: float
    stages: tuple[Stage, ...]


def compress_model(
    source: str, recipe: Recipe, output: Path, *, prompts: Path | None = None, bar: Bar
) -> Outcome:
    """Write a student of a model, with its plan, the analysis behind it and a report.

    Args:
        source: As `open_model` takes it.
        recipe: What to do.
        output: A new directory; plain diffusers loads it as it does the teacher's.
        prompts: Text file with a prompt a line; None takes the captions of the model's own world.
        bar: Starts progress bars.

    Raises:
        ToolchainError: Something asked for cannot be had; nothing has been written then.
    """
    check_new_directory(output)
    teacher = open_model(source)
    blocks = block_parameters(teacher.pipeline.transformer)
    planning.check_ratio(recipe.ratio, blocks, teacher.num_parameters)
    sets = _prompt_sets(teacher, recipe, prompts)

    judged = _sample(teacher, sets[0], recipe.seed + 1, "sampling for the check", bar)
    analysed = _sample(teacher, sets[1], recipe.seed + 2, "sampling for the analysis", bar)
    stages = [_stage("original", teacher, judged, recipe, bar)]

    advance = bar("removing each block", len(blocks))
    sensitivity = analyze(teacher, analysed, seed=recipe.seed, on_block=advance)
    plan = planning.build_plan(sensitivity, ratio=recipe.ratio)

    student = prune(teacher, plan)
    stages.append(_stage("pruned", student, judged, recipe, bar))

    if recipe.steps:
        taught = _sample(teacher, sets[2], recipe.seed + 3, "sampling to distil on", bar)
        freeze_preserved_(student, plan)
        advance = bar("distilling", recipe.steps)
        schedule = Schedule(
            steps=recipe.steps,
            learning_rate=recipe.learning_rate,
            warmup_steps=recipe.steps // 20,
            cooldown=0.7,
        )
        distill_(
            student,
            taught,
            schedule,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            on_step=lambda _, loss: advance(note=f"loss {loss:.4f}"),
        )
        stages.append(_stage("distilled", student, judged, recipe, bar))

    outcome = Outcome(
        model=source,
        student=str(output),
        removed_blocks=plan.removed_blocks,
        ratio_reached=plan.ratio_reached,
        stages=tuple(stages),
    )
    with new_directory(output) as directory:
        save_model_(student, directory)
        write_json(directory / planning.PLAN_FILE, planning.to_json(plan))
        write_json(directory / SENSITIVITY_FILE, planning.to_json(sensitivity))
        report = {"schema_version": 1, "recipe": asdict(recipe), **asdict(outcome)}
        write_json(directory / REPORT_FILE, report)
    return outcome


def _prompt_sets(teacher: Model, recipe: Recipe, path: Path | None) -> tuple[list[str], list[str], list[str]]:
    """Prompts to judge on, to analyse on and to train on; the first share none with the others."""
    guided = teacher.defaults.guidance_scale > 1
    states_per_prompt = teacher.defaults.num_inference_steps * (2 if guided else 1)
    num_taught = -(-recipe.steps * recipe.batch_size // (recipe.passes * states_per_prompt))
    few = recipe.analysis_prompts
    if path is None:
        if teacher.world is None:
            raise ToolchainError(
                f"{teacher.source} is not of the shapes world, so what to prompt it with is not known here; "
                "give a text file with one prompt a line: --prompts FILE"
            )
        unseen, seen = captions(held_out=True, seed=recipe.seed), captions(held_out=False, seed=recipe.seed)
        return (
            [caption.text for caption in islice(unseen, few)],
            [caption.text for caption in islice(seen, few)],
            [caption.text for caption in islice(seen, num_taught)],
        )
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ToolchainError(f"the prompts in {path} cannot be read: {error}") from error
    if len(lines) < 2 * few:
        raise ToolchainError(f"{path} holds {len(lines)} prompts; at least {2 * few} are needed")
    rest = lines[few:]
    return lines[:few], rest[:few], [rest[index % len(rest)] for index in range(num_taught)]


def _sample(model: Model, prompts: list[str], seed: int, name: str, bar: Bar) -> States:
    batch_size = 32
    advance = bar(name, -(-len(prompts) // batch_size) * model.defaults.num_inference_steps)
    return sample_states(model, prompts, seed=seed, batch_size=batch_size, on_step=advance)


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
        velocity_error=float(velocity_errors(model.pipeline.transformer, judged).mean()),
        score=score,
    )
