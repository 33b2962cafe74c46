"""From a model to a student: analyse, plan, compress, evaluate."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.filesize import decimal
from rich.table import Table

from profiles.schema import load_profile
from toolchain.cli.shell import (
    GATE_EXIT,
    Device,
    Json,
    NumPrompts,
    Prompts,
    Remove,
    Seed,
    Source,
    WeightsIn,
    app,
    bars,
    console,
    emit,
    fail,
    name_of,
    print_,
    remember,
)
from toolchain.errors import ToolchainError
from toolchain.geometry import Semantics
from toolchain.plan import SENSITIVITY_FILE, RuleName, StrengthMode
from toolchain.processes import processes, use_device
from toolchain.rules import Budget, Grain, Options, PositionWeight, parse_units

if TYPE_CHECKING:
    from toolchain.compress import Decision, Outcome
    from toolchain.data.shards import Index
    from toolchain.evaluate import ShapesScore
    from toolchain.families import Model
    from toolchain.plan import Sensitivity

Analysis = Annotated[
    Path | None,
    typer.Option(help=f"A {SENSITIVITY_FILE} of `analyze`, to be used in place of a new analysis."),
]
Ratio = Annotated[
    float | None,
    typer.Option(help="Share of the transformer's parameters to remove; 0.25 unless a limit is given."),
]
MaxBytes = Annotated[
    int | None, typer.Option(help="In place of --ratio: most bytes of the transformer's weights.")
]
Bits = Annotated[float, typer.Option(help="Bits of a weight, for --max-bytes.")]
MaxFlops = Annotated[
    float | None, typer.Option(help="In place of --ratio: share of the transformer's FLOPs that may stay.")
]
Rule = Annotated[RuleName, typer.Option(help="How to choose what goes.")]
Strengths = Annotated[StrengthMode, typer.Option(help="How strongly the parts that stay are trained.")]
Removal = Annotated[
    Semantics,
    typer.Option("--semantics", help="What a removed part leaves: nothing, or its input passed on."),
]
Weight = Annotated[
    PositionWeight | None, typer.Option(help="How position weighs in; default: the rule's own.")
]
ProtectFirst = Annotated[
    int | None, typer.Option(help="Blocks at the start of which nothing goes; default: the rule's own.")
]
ProtectLast = Annotated[int | None, typer.Option(help="The same at the end.")]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        help="A LoRA adapter to bake in first, FILE.safetensors or a hub id, with :SCALE behind; may repeat.",
    ),
]
AccelerateConfig = Annotated[
    Path | None,
    typer.Option(help="Of `accelerate config`: do it in the processes it asks for."),
]
OfGrain = Annotated[Grain, typer.Option(help="What the rule hpp-iterative removes.")]


def _follow(context: typer.Context, recipe: str | None) -> str | None:
    """Have a recipe speak for every option that is not given by hand."""
    if recipe is not None:
        from recipes.schema import load_recipe

        context.default_map = load_recipe(recipe).options
    return recipe


def _given_by_hand(context: typer.Context) -> set[str]:
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


OfRecipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="One of `hptool recipes`, or a .toml file: it says what is not given by hand.",
        is_eager=True,
        callback=_follow,
    ),
]


@app.command()
def analyze(
    model: Source = "shapes",
    metric: Annotated[
        str, typer.Option(help="What judges the harm, options behind a colon: clip:directory=DIR.")
    ] = "velocity",
    prompts: Prompts = None,
    num_prompts: NumPrompts = 16,
    num_seeds: Annotated[int, typer.Option(help="Noises for each prompt.", min=1)] = 2,
    semantics: Removal = "zero",
    components: Annotated[bool, typer.Option(help="Also the components of the blocks.")] = True,
    pairs: Annotated[bool, typer.Option(help="Also pairs of neighbours.")] = False,
    lora: Lora = None,
    precision: WeightsIn = "float32",
    device: Device = None,
    seed: Seed = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory; of an earlier run, to go on with it.")
    ] = None,
    accelerate_config: AccelerateConfig = None,
    as_json: Json = False,
) -> None:
    """Measure how much every block and component matters."""
    directory = output or Path(f"{name_of(model)}-analysis")
    rest = f"Once the cause is mended, the same command goes on with what {directory} holds"
    if _launched(accelerate_config, lambda: rest):
        return

    from toolchain.analysis import analyze as measure
    from toolchain.analysis import num_units
    from toolchain.artifacts import write_json
    from toolchain.compress import analysis_prompts
    from toolchain.metrics import open_metric
    from toolchain.plan import to_json
    from toolchain.plots import draw_sensitivity

    if device is not None:
        use_device(device)
    judge = open_metric(metric)
    opened = _open(model, precision, lora)
    texts = analysis_prompts(opened, prompts, num_prompts, seed=seed)
    seeds = range(seed, seed + num_seeds)
    total = num_units(opened, judge, texts, seeds=seeds, components=components, pairs=pairs)
    with bars() as bar:
        found = measure(
            opened,
            judge,
            texts,
            seeds=seeds,
            semantics=semantics,
            components=components,
            pairs=pairs,
            work=directory / "pieces",
            on_step=bar("removing each part in turn", total),
        )
    if processes().is_first:
        write_json(directory / SENSITIVITY_FILE, to_json(found))
        draw_sensitivity(found, directory / "sensitivity.png")
    emit(to_json(found), as_json, lambda: _show_sensitivity(found, directory))


@app.command()
def plan(
    model: Annotated[
        str, typer.Argument(help="A model as for `analyze`; or a plan.json, to look at it.")
    ] = "shapes",
    ratio: Ratio = None,
    max_bytes: MaxBytes = None,
    bits: Bits = 16,
    max_flops: MaxFlops = None,
    rule: Rule = "hpp-iterative",
    remove: Remove = None,
    strengths: Strengths = "none",
    semantics: Removal = "zero",
    position_weight: Weight = None,
    protect_first: ProtectFirst = None,
    protect_last: ProtectLast = None,
    grain: OfGrain = "components",
    analysis: Analysis = None,
    prompts: Prompts = None,
    num_prompts: NumPrompts = 16,
    lora: Lora = None,
    precision: WeightsIn = "float32",
    device: Device = None,
    seed: Seed = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file to write the plan to.")
    ] = None,
    accelerate_config: AccelerateConfig = None,
    as_json: Json = False,
) -> None:
    """Decide what goes, what stays frozen and what is trained, and show it as a picture of the model."""
    if _launched(accelerate_config, lambda: "Once the cause is mended, give the same command again"):
        return

    from toolchain.artifacts import read_json, write_json
    from toolchain.picture import draw_plan, render_plan
    from toolchain.plan import plan_from_json, to_json

    if model.endswith(".json"):
        made = plan_from_json(read_json(Path(model)))
    else:
        from toolchain.compress import analysis_prompts, decide, needs_prompts

        if device is not None:
            use_device(device)
        opened = _open(model, precision, lora)
        decision = _decision(
            opened,
            Options(
                position_weight=position_weight,
                protect_first=protect_first,
                protect_last=protect_last,
                grain=grain,
                seed=seed,
            ),
            (ratio, max_bytes, bits, max_flops),
            (rule, remove, strengths, semantics, num_prompts, seed),
        )
        with bars() as bar:
            texts = []
            if needs_prompts(decision, analysis):
                texts = analysis_prompts(opened, prompts, decision.prompts, seed=seed)
            _, made = decide(opened, decision, texts, analysis=analysis, bar=bar)
        path = output or Path(f"{name_of(model)}-plan.json")
        if processes().is_first:
            write_json(path, to_json(made))
            draw_plan(made, path.with_suffix(".png"))

    def show() -> None:
        print_(render_plan(made))
        if not model.endswith(".json"):
            print_(f"Written to {path}.  Next:  hptool compress {model} --plan {path}")

    emit(to_json(made), as_json, show)


@app.command()
def compress(
    context: typer.Context,
    model: Source = "shapes",
    recipe: OfRecipe = None,
    ratio: Ratio = None,
    max_bytes: MaxBytes = None,
    bits: Bits = 16,
    max_flops: MaxFlops = None,
    rule: Rule = "hpp-iterative",
    remove: Remove = None,
    strengths: Strengths = "none",
    semantics: Removal = "zero",
    position_weight: Weight = None,
    protect_first: ProtectFirst = None,
    protect_last: ProtectLast = None,
    grain: OfGrain = "components",
    analysis: Analysis = None,
    num_prompts: NumPrompts = 16,
    target: Annotated[
        str | None,
        typer.Option("--target", "-t", help="In place of --ratio: as little as lets it fit on that device."),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="A plan of `hptool plan`, in place of all that decides one.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of distillation.", min=0)] = 500,
    learning_rate: Annotated[float, typer.Option(help="Of distillation, at its peak.")] = 7e-4,
    batch_size: Annotated[int, typer.Option(help="States at once, of all processes together.", min=1)] = 64,
    accumulate: Annotated[
        int, typer.Option(help="Parts a batch is taken in, one after the other, for less memory.", min=1)
    ] = 1,
    features: Annotated[
        float, typer.Option(help="Weight of the blocks' outputs in the loss; the velocity's is 1.", min=0)
    ] = 0.0,
    checkpointing: Annotated[
        bool, typer.Option(help="Train in less memory, at a third more time for the student's part.")
    ] = False,
    cache_prefix: Annotated[
        bool,
        typer.Option(help="Keep the outputs of the frozen beginning on disk; for --strengths pwp and such."),
    ] = False,
    turn: Annotated[
        int | None,
        typer.Option(help="Let teacher and student take turns in memory, each of so many steps.", min=1),
    ] = None,
    ema: Annotated[
        float | None,
        typer.Option(help="Decay of the averaged weights the student is made of; default: the last ones."),
    ] = None,
    checkpoint_every: Annotated[
        int, typer.Option(help="Steps after which a run that was stopped can go on.", min=1)
    ] = 250,
    check_every: Annotated[
        int | None,
        typer.Option(help="Steps between looks at the student: its numbers, and pictures.", min=1),
    ] = None,
    gate: Annotated[
        str | None,
        typer.Option(
            help="What it has to be worth: shapes>=0.95, velocity<=0.02, or so. A look that "
            "finds it so ends the training; if the end does not, less is removed and it is tried again."
        ),
    ] = None,
    tracker: Annotated[
        list[str] | None,
        typer.Option(help="Where numbers and pictures go besides: tensorboard, wandb, ... Repeatable."),
    ] = None,
    lora: Lora = None,
    precision: WeightsIn = "float32",
    device: Device = None,
    seed: Seed = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory to write the student to.")
    ] = None,
    prompts: Prompts = None,
    data: Annotated[
        Path | None,
        typer.Option(help="What `hptool precompute` wrote, to distil on in place of paintings of prompts."),
    ] = None,
    per_task: Annotated[
        int, typer.Option(help="Held-out captions per ShapesEval task; 0 skips the scores.", min=0)
    ] = 40,
    accelerate_config: AccelerateConfig = None,
    as_json: Json = False,
) -> None:
    """Remove what a model needs least, and teach the rest to do without it."""
    from toolchain.artifacts import check_new_directory, read_json

    student = output or Path(f"{name_of(model)}-student")
    check_new_directory(student)

    def kept() -> str:
        saved = sorted(Path(f"{student}.work").rglob("step-*.safetensors"))
        what = f"{saved[-1]} is the last state that was saved" if saved else "No state had been saved yet"
        return f"{what}; once the cause is mended, the same command goes on from there"

    if _launched(accelerate_config, kept):
        return

    from toolchain.compress import Recipe, compress_model
    from toolchain.data.shards import open_precomputed
    from toolchain.gate import parse_gate
    from toolchain.losses import LossWeights
    from toolchain.plan import plan_from_json

    if device is not None:
        use_device(device)
    if by_hand := _given_by_hand(context) & {"ratio", "max_bytes", "max_flops", "remove", "target", "plan"}:
        # One of them says what goes: given by hand, it takes the place of another one in a recipe.
        ratio, remove = ratio if "ratio" in by_hand else None, remove if "remove" in by_hand else None
    if target is not None:
        if any(item is not None for item in (ratio, max_bytes, max_flops, remove, plan)):
            raise ToolchainError("--target chooses the ratio, so it takes no other limit and no plan")
        ratio = _ratio_for(model, target)
    precomputed = None
    if data is not None:
        with bars() as bar:
            precomputed = open_precomputed(data, bar=bar)
    wanted = None if gate is None else parse_gate(gate)
    # Captions of the data are encoded already, so only pictures to judge by need more than the transformer.
    paints = check_every is not None or not (wanted is None or wanted.metric == "velocity")
    lean = data is not None and prompts is None and not lora and not paints
    opened = _open(model, precision, lora, transformer_only=lean)
    if lean and opened.world is not None and per_task:
        opened = _open(model, precision, lora)
    decision = _decision(
        opened,
        Options(
            position_weight=position_weight,
            protect_first=protect_first,
            protect_last=protect_last,
            grain=grain,
            seed=seed,
        ),
        (ratio, max_bytes, bits, max_flops),
        (rule, remove, strengths, semantics, num_prompts, seed),
    )
    work = Recipe(
        decision=decision,
        steps=steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        losses=LossWeights(features=features),
        checkpointing=checkpointing,
        accumulate=accumulate,
        cache_prefix=cache_prefix,
        turn=turn,
        ema_decay=ema,
        checkpoint_every=checkpoint_every,
        check_every=check_every,
        gate=wanted,
        seed=seed,
        captions_per_task=per_task,
    )
    given = None if plan is None else plan_from_json(read_json(plan))
    with bars() as bar:
        outcome = compress_model(
            opened,
            work,
            student,
            prompts=prompts,
            data=precomputed,
            analysis=analysis,
            plan=given,
            trackers=tracker or (),
            bar=bar,
            say=console.print,
        )
    remember(student=student)
    emit(asdict(outcome), as_json, lambda: _show_outcome(outcome, student))
    if outcome.tries[-1].passed is False:
        reached = outcome.tries[-1].gate
        fail(f"{student} was written, but did not pass its gate {outcome.gate}: {reached:.4g}", GATE_EXIT)


def _launched(config: Path | None, kept: Callable[[], str]) -> bool:
    """Whether this command was done in processes of accelerate's; `kept` as `launch` takes it."""
    if config is None:
        return False
    from toolchain.launch import launch

    if last_words := launch(config, _arguments_launched(), kept):
        fail(*last_words)
    return True


def _arguments_launched() -> list[str]:
    """Those of this command line but for --accelerate-config."""
    given = sys.argv[1:]
    at = next(index for index, item in enumerate(given) if item.startswith("--accelerate-config"))
    return given[:at] + given[at + (1 if "=" in given[at] else 2) :]


@app.command()
def precompute(
    model: Source,
    data: Annotated[
        Path,
        typer.Argument(
            help="Captioned pictures in a folder, WebDataset tars, a directory of `datasets`, parquet; or a "
            "text file of prompts."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    batch_size: Annotated[int, typer.Option(help="Pictures, captions or prompts at once.", min=1)] = 8,
    dtype: Annotated[
        Literal["bfloat16", "float32"], typer.Option(help="Of what is written; float32 takes twice the disk.")
    ] = "bfloat16",
    one_size: Annotated[
        bool, typer.Option(help="Cut all pictures to the model's own size, for one that knows no other.")
    ] = False,
    lora: Lora = None,
    precision: WeightsIn = "float32",
    device: Device = None,
    seed: Seed = 0,
    accelerate_config: AccelerateConfig = None,
    as_json: Json = False,
) -> None:
    """Encode a data set once, for `compress --data`; stopped, it goes on where it was."""
    rest = "Once the cause is mended, the same command goes on after the last whole shard"
    if _launched(accelerate_config, lambda: rest):
        return

    from toolchain.artifacts import check_new_directory
    from toolchain.data.precompute import Settings
    from toolchain.data.precompute import precompute as encode
    from toolchain.data.shards import index_to_json
    from toolchain.data.sources import open_source

    if device is not None:
        use_device(device)
    check_new_directory(output)
    source = open_source(data)
    opened = _open(model, precision, lora)
    settings = Settings(batch_size=batch_size, dtype=dtype, seed=seed, one_size=one_size)
    with bars() as bar:
        index = encode(opened, source, output, settings, bar=bar)
    emit(index_to_json(index), as_json, lambda: _show_precomputed(index, output))


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A bundle directory, or a model as for `compress`.")],
    per_task: Annotated[int, typer.Option(help="Held-out captions per task.", min=1)] = 100,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Score a bundle or a model of the `shapes` world with ShapesEval."""
    from deploy.bundle import MANIFEST
    from toolchain.evaluate import Painter, evaluate_shapes, num_batches

    painter: Painter
    if (Path(model) / MANIFEST).exists():
        from deploy.pipeline import EdgePipeline

        painter = EdgePipeline.open(model)
    else:
        from toolchain.families import open_model

        opened = open_model(model)
        if opened.world is None:
            raise ToolchainError(f"{model} is not a model of the shapes world, which ShapesEval is about")
        painter = opened
    with bars() as bar:
        advance = bar("ShapesEval", num_batches(per_task))
        score = evaluate_shapes(painter, num_per_task=per_task, seed=seed, on_batch=advance)
    emit(asdict(score), as_json, lambda: _show_score(model, score))


def _open(
    model: str,
    precision: Literal["float32", "stored"],
    adapters: list[str] | None,
    *,
    transformer_only: bool = False,
) -> Model:
    from toolchain.families import open_model

    opened = open_model(model, precision=precision, transformer_only=transformer_only)
    if adapters:
        from toolchain.lora import Adapter, bake_

        opened = bake_(opened, map(Adapter.parse, adapters))
    return opened


def _decision(
    model: Model,
    options: Options,
    limits: tuple[float | None, int | None, float, float | None],
    rest: tuple[RuleName, str | None, StrengthMode, Semantics, int, int],
) -> Decision:
    from toolchain.compress import Decision

    (ratio, max_bytes, bits, max_flops), (rule, remove, strengths, semantics, prompts, seed) = limits, rest
    budget = None
    if remove is not None:
        if any(limit is not None for limit in (ratio, max_bytes, max_flops)):
            raise ToolchainError(
                "--remove says what goes, so it takes no --ratio, --max-bytes or --max-flops"
            )
        options = replace(options, units=parse_units(remove, model.geometry))
        rule = "manual"
    else:
        ratio = 0.25 if (ratio, max_bytes, max_flops) == (None, None, None) else ratio
        budget = Budget(ratio=ratio, max_bytes=max_bytes, bits=bits, max_flops=max_flops)
    return Decision(
        budget=budget,
        rule=rule,
        options=options,
        semantics=semantics,
        strengths=strengths,
        prompts=prompts,
        seed=seed,
    )


def _ratio_for(model: str, target: str) -> float:
    """The smallest share of the transformer whose removal lets a model fit on a device."""
    from export.fit import ModelSize, fit_target
    from toolchain.families import open_model

    profile = load_profile(target)
    with bars() as bar:
        found = fit_target(
            ModelSize(open_model(model, precision="config"), bar=bar), profile, profile.weight_bits
        )
    ratio = found.least_ratio.get(found.bits)
    if ratio is None:
        raise ToolchainError(
            f"{model} does not fit on {profile.name} even without half of its transformer: as it is, it is "
            f"too large by {decimal(found.missing)}. `hptool fit {model}` shows where the memory goes."
        )
    if ratio == 0:
        raise ToolchainError(
            f"{model} fits on {profile.name} as it is, in {found.bits} bits: export it, or name a --ratio to "
            "make it smaller and faster."
        )
    console.print(
        f"{profile.name} holds {model} without {ratio:.0%} of its transformer, in {found.bits} bits"
    )
    return ratio


def _show_sensitivity(found: Sensitivity, directory: Path) -> None:
    ranked = sorted((item for item in found.harms if len(item.removed) == 1), key=lambda item: item.harm)
    table = Table("least harm", "", "most harm", "", title=f"{found.model}: {found.metric} without one part")
    for least, most in list(zip(ranked, reversed(ranked), strict=True))[:10]:
        cells = (
            (str(item.removed[0]), f"{item.harm:.4g} ± {item.standard_error:.2g}") for item in (least, most)
        )
        table.add_row(*(cell for pair in cells for cell in pair))
    print_(table)
    print_(f"Written to {directory / SENSITIVITY_FILE}, drawn in {directory / 'sensitivity.png'}.")


def _show_outcome(outcome: Outcome, student: Path) -> None:
    table = Table(
        title=f"{outcome.model} without {outcome.removed}: {outcome.ratio_reached:.1%} of the parameters, "
        f"{outcome.flops_ratio_reached:.1%} of the FLOPs"
    )
    for heading in ("", "parameters", "transformer bytes", "velocity error", "ShapesEval"):
        table.add_column(heading, justify="left" if not heading else "right")
    for stage in outcome.stages:
        table.add_row(
            stage.name,
            f"{stage.num_parameters:,}",
            f"{stage.transformer_bytes:,}",
            f"{stage.velocity_error:.4f}",
            "-" if stage.score is None else f"{stage.score.mean:.3f} ± {stage.score.standard_error:.3f}",
        )
    print_(table)
    print_(f"Student written to {student}.  Next:  hptool export --target cpu-x86")


def _show_precomputed(index: Index, output: Path) -> None:
    table = Table("", "rows", "files", "bytes", title=f"{index.facts.source}, as {index.facts.model} sees it")
    for kind in ("latents", "pairs", "states", "text"):
        if shards := index.of(kind):
            size = sum((output / shard.file).stat().st_size for shard in shards)
            rows = sum(shard.rows for shard in shards)
            table.add_row(kind, f"{rows:,}", f"{len(shards):,}", decimal(size))
    print_(table)
    if index.skipped:
        print_(f"Skipped {len(index.skipped)}, all listed in {output / 'index.json'}; the first:")
        for item in index.skipped[:5]:
            print_(f"  {item.key}: {item.reason}")
    print_(f"Written to {output}.  Next:  hptool compress {index.facts.model} --data {output}")


def _show_score(model: str, score: ShapesScore) -> None:
    table = Table("task", "score", title=f"ShapesEval of {model}, {score.num_per_task} captions a task")
    for task, value in score.tasks.items():
        table.add_row(task, f"{value:.3f}")
    table.add_row("mean", f"{score.mean:.3f} ± {score.standard_error:.3f}", style="bold")
    print_(table)
