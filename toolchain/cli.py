"""The `hptool` command: every command is a typed signature, one call and one rendered result."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from deploy.errors import DeployError
from export.errors import ExportError
from profiles.schema import Profile, ProfileError, available_profiles, field_docs, load_profile
from toolchain.errors import ToolchainError
from toolchain.geometry import Semantics
from toolchain.plan import PLAN_FILE, SENSITIVITY_FILE, RuleName, StrengthMode
from toolchain.rules import Budget, Grain, Options, PositionWeight, parse_units

if TYPE_CHECKING:
    from deploy.bench import Bench
    from deploy.doctor import Fault, Verdict
    from deploy.machine import Machine
    from export.calibration import Calibration
    from export.fit import Fit
    from toolchain.compress import Decision, Outcome
    from toolchain.evaluate import ShapesScore
    from toolchain.families import Model
    from toolchain.plan import Sensitivity

app = typer.Typer(
    help="Make a text-to-image diffusion transformer small enough for your device, and run it there.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_console = Console(stderr=True)

# What a missing import means to a user: the extra that brings it.
_EXTRA_OF = {
    **dict.fromkeys(
        ("torch", "diffusers", "transformers", "accelerate", "safetensors", "scipy", "matplotlib"), "compress"
    ),
    **dict.fromkeys(("onnx", "onnxscript", "onnx_ir", "nncf", "polygraphy"), "export"),
    **dict.fromkeys(("onnxruntime", "tokenizers", "PIL", "numpy"), "edge"),
    **dict.fromkeys(("fastapi", "uvicorn", "prometheus_client"), "serve"),
    "tensorrt_rtx": "rtx",
}

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Seed = Annotated[int, typer.Option(help="Of everything random.", min=0)]


Address = Annotated[str, typer.Argument(help="hf://owner/name[@revision] or oci://registry/repository:tag.")]
PublicKey = Annotated[
    Path | None,
    typer.Option(help="Public key, in PEM: a bundle that it did not sign is refused."),
]
Source = Annotated[
    str, typer.Argument(help="`shapes`, a directory of a diffusers pipeline, or a hub id owner/name.")
]
Prompts = Annotated[
    Path | None, typer.Option(help="Text file with a prompt a line; needed for any model but `shapes`.")
]
NumPrompts = Annotated[int, typer.Option(help="Prompts to measure harm on.", min=1)]
WeightsIn = Annotated[
    Literal["float32", "stored"],
    typer.Option(
        "--precision", help="What the model is held in: `stored` takes half the memory for 16-bit weights."
    ),
]
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
Remove = Annotated[
    str | None,
    typer.Option(
        help="In place of a rule and a limit: what goes, as 25-28,31-34,13.ff; ranges are inclusive."
    ),
]
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
OnRuntime = Annotated[
    str | None, typer.Option(help="What has to run it, as onnxruntime-cpu; default: the best.")
]
WithoutT5 = Annotated[
    Literal["t5"] | None,
    typer.Option("--without", help="Leave out the T5 text encoder of Stable Diffusion 3."),
]
OfGrain = Annotated[Grain, typer.Option(help="What the rule hpp-iterative removes.")]


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
    precision: WeightsIn = "float32",
    seed: Seed = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory; of an earlier run, to go on with it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure how much every block and component matters."""
    from toolchain.analysis import analyze as measure
    from toolchain.analysis import num_units
    from toolchain.artifacts import write_json
    from toolchain.compress import analysis_prompts
    from toolchain.families import open_model
    from toolchain.metrics import open_metric
    from toolchain.plan import to_json
    from toolchain.plots import draw_sensitivity

    judge = open_metric(metric)
    opened = open_model(model, precision=precision)
    texts = analysis_prompts(opened, prompts, num_prompts, seed=seed)
    seeds = range(seed, seed + num_seeds)
    directory = output or Path(f"{_name(model)}-analysis")
    total = num_units(opened, judge, texts, seeds=seeds, components=components, pairs=pairs)
    with _bars() as bar:
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
    write_json(directory / SENSITIVITY_FILE, to_json(found))
    picture = directory / "sensitivity.png"
    draw_sensitivity(found, picture)
    _emit(to_json(found), as_json, lambda: _show_sensitivity(found, directory))


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
    precision: WeightsIn = "float32",
    seed: Seed = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file to write the plan to.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Decide what goes, what stays frozen and what is trained, and show it as a picture of the model."""
    from toolchain.artifacts import read_json, write_json
    from toolchain.picture import draw_plan, render_plan
    from toolchain.plan import plan_from_json, to_json

    if model.endswith(".json"):
        made = plan_from_json(read_json(Path(model)))
    else:
        from toolchain.compress import analysis_prompts, decide
        from toolchain.families import open_model

        opened = open_model(model, precision=precision)
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
        with _bars() as bar:
            texts = analysis_prompts(opened, prompts, decision.prompts, seed=seed)
            _, made = decide(opened, decision, texts, analysis=analysis, bar=bar)
        path = output or Path(f"{_name(model)}-plan.json")
        write_json(path, to_json(made))
        draw_plan(made, path.with_suffix(".png"))

    def show() -> None:
        print_(render_plan(made))
        if not model.endswith(".json"):
            print_(f"Written to {path}.  Next:  hptool compress {model} --plan {path}")

    _emit(to_json(made), as_json, show)


@app.command()
def compress(
    model: Source = "shapes",
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
    batch_size: Annotated[int, typer.Option(help="States at once.", min=1)] = 64,
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
    precision: WeightsIn = "float32",
    seed: Seed = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory to write the student to.")
    ] = None,
    prompts: Prompts = None,
    per_task: Annotated[
        int, typer.Option(help="Held-out captions per ShapesEval task; 0 skips the scores.", min=0)
    ] = 40,
    as_json: Json = False,
) -> None:
    """Remove what a model needs least, and teach the rest to do without it."""
    from toolchain.artifacts import check_new_directory, read_json
    from toolchain.compress import Recipe, compress_model
    from toolchain.families import open_model
    from toolchain.losses import LossWeights
    from toolchain.plan import plan_from_json

    student = output or Path(f"{_name(model)}-student")
    check_new_directory(student)
    if target is not None:
        if any(item is not None for item in (ratio, max_bytes, max_flops, remove, plan)):
            raise ToolchainError("--target chooses the ratio, so it takes no other limit and no plan")
        ratio = _ratio_for(model, target)
    opened = open_model(model, precision=precision)
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
    recipe = Recipe(
        decision=decision,
        steps=steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        losses=LossWeights(features=features),
        checkpointing=checkpointing,
        cache_prefix=cache_prefix,
        turn=turn,
        seed=seed,
        captions_per_task=per_task,
    )
    given = None if plan is None else plan_from_json(read_json(plan))
    with _bars() as bar:
        outcome = compress_model(
            opened, recipe, student, prompts=prompts, analysis=analysis, plan=given, bar=bar
        )
    _remember(student=student)
    _emit(asdict(outcome), as_json, lambda: _show_outcome(outcome, student))


@app.command()
def calibrate(
    student: Annotated[
        str | None, typer.Argument(help="Model to be exported; default: what `compress` wrote last here.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory to write to; a stopped run goes on.")
    ] = None,
    prompts: Prompts = None,
    num_prompts: NumPrompts = 24,
    precision: WeightsIn = "float32",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Note what a model's linears see while it samples, and what rounding them would harm."""
    from export.calibration import calibrate as measure
    from toolchain.compress import analysis_prompts
    from toolchain.families import open_model

    source = student or _remembered_student()
    directory = output or Path(Path(source).resolve().name.removesuffix("-student") + "-calibration")
    model = open_model(source, precision=precision)
    with _bars() as bar:
        asked = analysis_prompts(model, prompts, num_prompts, seed=seed)
        found = measure(model, asked, directory, seed=seed, bar=bar)
    worst = sorted(found.harms, key=lambda item: -item.error4)[:10]

    def show() -> None:
        table = Table("weight", "harm in 4 bits", "in 8", title=f"what rounding harms most in {source}")
        for item in worst:
            table.add_row(item.name, f"{item.error4:.2e}", f"{item.error8:.2e}")
        print_(table)
        print_(f"Use it:  hptool export {source} --calibration {directory} --bits auto")

    _emit({"calibration": str(directory), "worst": [asdict(item) for item in worst]}, as_json, show)


@app.command()
def export(
    student: Annotated[
        str | None, typer.Argument(help="Model to export; default: what `compress` wrote last here.")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", "-t", help="As `hptool targets` lists them, or a .toml file; may repeat."),
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(
            help="Bits of the transformer's weights: 4, 8, 16, 32, or auto with --calibration; default: what "
            "the targets say."
        ),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="What `hptool calibrate` wrote: rounding heeds what matters.")
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(help="With --bits auto, of the blocks' linears; default: what 4 bits would take."),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(help="Relative error of the velocity that rounding may cause; 0.2 for 4 bits.", min=0.0),
    ] = None,
    without: WithoutT5 = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory to write the bundle to.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Lower a model to ONNX with INT4 weights, build engines, and bundle it all for a device."""
    targets = [load_profile(name) for name in dict.fromkeys(target or ["cpu-x86"])]
    source = student or _remembered_student()
    bundle_path = output or Path(Path(source).resolve().name.removesuffix("-student") + "-bundle")

    from toolchain.artifacts import check_new_directory, read_json, sha256
    from toolchain.card import read_card
    from toolchain.plan import plan_from_json

    check_new_directory(bundle_path)

    from deploy.kept import cache_directory
    from export.bundle import export_bundle
    from export.cache import ComponentCache
    from export.calibration import read_calibration
    from export.engine import ENGINES
    from toolchain.families import open_model

    model = open_model(source, precision="none")
    if without == "t5":
        model = model.without_t5()
    path = model.path / PLAN_FILE
    plan = plan_from_json(read_json(path)) if path.exists() else None
    card = read_card(model.path)
    known = None if calibration is None else read_calibration(calibration, model)
    number, budget = _bits(bits, max_bytes, known, targets[0].group_size)
    with _bars() as bar:
        bundle = export_bundle(
            model,
            targets=targets,
            output=bundle_path,
            bits=number,
            bits_of_components=None if plan is None else plan.student_bits,
            calibration=known,
            max_bytes=budget,
            most_error=max_error,
            cache=ComponentCache(cache_directory()),
            bar=bar,
            plan_sha256=None if plan is None else sha256(path),
            base_model=None if plan is None else plan.model,
            base_revision=card.base_revision,
            license=card.license,
        )
    files = {name: entry.bytes for name, entry in bundle.manifest.files.items()}
    variants = [asdict(variant) for variant in bundle.manifest.variants]
    engines = read_json(bundle.file(ENGINES))["engines"] if ENGINES in files else []

    def show() -> None:
        table = Table("file", "MB", title=f"bundle {bundle_path}")
        for name, size in files.items():
            table.add_row(name, f"{size / 1e6:.2f}")
        print_(table)
        if engines:
            print_(_engine_table(engines))
        print_(f"Run it:  hptool run {bundle_path} 'a red circle left of a blue square' -o out.png")

    facts = {"bundle": str(bundle_path), "files": files, "variants": variants, "engines": engines}
    _emit(facts, as_json, show)


@app.command()
def run(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    prompt: Annotated[str, typer.Argument(help="What to paint.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG to write.")] = Path("out.png"),
    negative_prompt: Annotated[str, typer.Option(help="What not to paint.")] = "",
    steps: Annotated[int | None, typer.Option(help="Sampling steps.", min=1)] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance scale; 1 or less is none.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    count: Annotated[int, typer.Option("--num-images", "-n", help="Pictures, side by side.", min=1)] = 1,
    seed: Seed = 0,
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="Variant to run; default: the best that runs here.")
    ] = None,
    runtime: OnRuntime = None,
    keep: Annotated[
        Literal["all", "one"] | None,
        typer.Option(help="Parts that stay in memory; default: all, if they fit into what is free."),
    ] = None,
    key: PublicKey = None,
    require_signature: Annotated[
        bool, typer.Option("--require-signature", help="Refuse to run without a --key to check with.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Paint a picture with a bundle; needs only the `edge` extra."""
    if require_signature and key is None:
        raise DeployError("--require-signature needs the public key of whoever is trusted: --key public.pem")

    from deploy.pipeline import EdgePipeline

    # Why this variant, what is prepared, what of a prompt was left out.
    logging.basicConfig(
        format="%(message)s",
        handlers=[RichHandler(console=_console, show_time=False, show_level=False, show_path=False)],
    )
    logging.getLogger("deploy").setLevel(logging.INFO)
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise DeployError(f"cannot write {output}: it is a directory or lies in none; choose another -o")
    pipeline = EdgePipeline.open(bundle, target=target, runtime=runtime, keep=keep, key=key)
    with _bars() as bar:
        advance = bar("sampling", steps or pipeline.bundle.manifest.defaults.num_inference_steps)
        result = pipeline(
            prompt,
            negative_prompt=negative_prompt,
            steps=steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            num_images=count,
            seed=seed,
            on_step=lambda *_: advance(),
        )
    from deploy.pipeline import save_png

    save_png(result.images, output)
    facts = {"output": str(output), "variant": asdict(result.variant), "timings_ms": result.timings_ms}
    _emit(facts, as_json, lambda: print_(f"{output}  ({result.variant.target}, {result.variant.runtime})"))


@app.command()
def serve(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any that is free.", min=0, max=65535)] = 8000,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token that clients send; or set HPTOOL_TOKEN.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen to other machines without a token.")
    ] = False,
    queue: Annotated[
        int, typer.Option(help="Requests that may wait; more are told to come again later.", min=0)
    ] = 16,
    timeout: Annotated[
        float, typer.Option(help="Seconds until a request is given up, waiting included.", min=1)
    ] = 300,
    grace: Annotated[
        float, typer.Option(help="Seconds for the picture being painted when the server is to stop.", min=0)
    ] = 30,
    max_images: Annotated[int, typer.Option(help="Pictures of one request.", min=1)] = 4,
    max_steps: Annotated[int, typer.Option(help="Sampling steps of a picture.", min=1)] = 100,
    max_size: Annotated[
        int | None,
        typer.Option(help="Pixels of the largest height and width; default: what the model can.", min=1),
    ] = None,
    max_prompt: Annotated[int, typer.Option(help="Characters of a prompt.", min=1)] = 4000,
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="Variant to run; default: the best that runs here.")
    ] = None,
    keep: Annotated[
        Literal["all", "one"] | None,
        typer.Option(help="Parts that stay in memory; default: all, if they fit into what is free."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Of onnxruntime; default: one for every core.", min=1)
    ] = None,
) -> None:
    """Serve a bundle over HTTP: OpenAI's images API and a web page; needs the `serve` extra."""
    from deploy.gate import read_token
    from deploy.images_api import Limits
    from deploy.pipeline import EdgePipeline
    from deploy.server import serve as serve_bundle

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("deploy").setLevel(logging.INFO)
    limits = Limits(
        queue=queue,
        timeout_seconds=timeout,
        grace_seconds=grace,
        images=max_images,
        steps=max_steps,
        side=max_size,
        prompt_characters=max_prompt,
    )
    serve_bundle(
        bundle,
        lambda: EdgePipeline.open(bundle, target=target, keep=keep, threads=threads),
        limits=limits,
        host=host,
        port=port,
        token=read_token(token_file),
        insecure=insecure,
        on_listen=lambda address: print_(f"Serving {bundle} on {address}"),
    )


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    key: PublicKey = None,
    as_json: Json = False,
) -> None:
    """Check that a bundle is whole and unchanged, and with a key that it is from whom you trust."""
    from deploy.bundle import MANIFEST, SIGNATURE, open_bundle
    from deploy.signature import open_signed_bundle

    opened = open_bundle(bundle) if key is None else open_signed_bundle(bundle, key)
    if key is not None:
        signature = f"made with the key of {key}"
    else:
        signature = "not checked, no --key" if (bundle / SIGNATURE).exists() else "none"
    files = opened.manifest.files

    def show() -> None:
        table = Table("file", "bytes", "sha256", title=f"bundle {bundle}")
        for name, file in files.items():
            table.add_row(name, f"{file.bytes:,}", file.sha256[:16])
        print_(table)
        print_(f"{MANIFEST}: schema {opened.manifest.schema_version}, its parts agree")
        print_(f"{len(files)} files: all listed, none missing, added or changed; no links")
        print_(f"signature: {signature}")

    facts = {
        "bundle": str(bundle),
        "schema_version": opened.manifest.schema_version,
        "signature": {"checked": key is not None, "present": (bundle / SIGNATURE).exists()},
        "provenance": asdict(opened.manifest.provenance),
        "files": {name: asdict(file) for name, file in files.items()},
    }
    _emit(facts, as_json, show)


@app.command()
def sign(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    key: Annotated[Path, typer.Option(help="Private key of an elliptic curve, in PEM.")],
    as_json: Json = False,
) -> None:
    """Sign a bundle, so that devices can tell it from one that somebody else made."""
    from deploy.bundle import SIGNATURE
    from deploy.signature import sign_bundle

    sign_bundle(bundle, key, password=os.environ.get("HPTOOL_KEY_PASSWORD"))
    written = str(bundle / SIGNATURE)
    _emit({"signature": written}, as_json, lambda: print_(written))


@app.command()
def push(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    destination: Address,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository on the hub that only you see.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Publish a bundle on the Hugging Face hub or in a registry of containers."""
    from deploy.transfer import push_bundle

    with _bars() as bar:
        push_bundle(bundle, destination, private=private, bar=bar)
    facts = {"bundle": str(bundle), "destination": destination}
    _emit(facts, as_json, lambda: print_(f"Fetch it:  hptool pull {destination} {bundle.resolve().name}"))


@app.command()
def pull(
    source: Address,
    directory: Annotated[Path, typer.Argument(help="New directory for the bundle.")],
    key: PublicKey = None,
    as_json: Json = False,
) -> None:
    """Fetch a bundle, check it, and only then give it its name."""
    from deploy.transfer import pull_bundle

    with _bars() as bar:
        bundle = pull_bundle(source, directory, key=key, bar=bar)
    size = sum(file.bytes for file in bundle.manifest.files.values())
    facts = {"bundle": str(directory), "bytes": size, "signature_checked": key is not None}
    _emit(facts, as_json, lambda: print_(f"{directory}  ({decimal(size)})"))


@app.command()
def bench(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    prompt: Annotated[str, typer.Argument(help="What to paint.")] = "a photo of a red bicycle",
    steps: Annotated[int | None, typer.Option(help="Sampling steps.", min=1)] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    repeats: Annotated[int, typer.Option(help="Pictures after the first.", min=1)] = 5,
    threads: Annotated[int | None, typer.Option(help="Default: one for every core.", min=1)] = None,
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="Variant to run; default: the best that runs here.")
    ] = None,
    runtime: OnRuntime = None,
    as_json: Json = False,
) -> None:
    """Measure how long pictures take here, part by part; needs only the `edge` extra."""
    from deploy.bench import run_bench

    with _bars() as bar:
        advance = bar("painting", 1 + repeats)
        found = run_bench(
            bundle,
            target=target,
            runtime=runtime,
            prompt=prompt,
            steps=steps,
            height=height,
            width=width,
            repeats=repeats,
            threads=threads,
            on_picture=advance,
        )
    _emit(asdict(found), as_json, lambda: _show_bench(found))


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
    with _bars() as bar:
        advance = bar("ShapesEval", num_batches(per_task))
        score = evaluate_shapes(painter, num_per_task=per_task, seed=seed, on_batch=advance)
    _emit(asdict(score), as_json, lambda: _show_score(model, score))


targets_app = typer.Typer(no_args_is_help=False, rich_markup_mode=None)
app.add_typer(targets_app, name="targets")


@targets_app.callback(invoke_without_command=True)
def targets(
    context: typer.Context,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print them as docs/targets.md has them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the devices that a bundle can be exported for."""
    if context.invoked_subcommand is not None:
        if as_markdown or as_json:
            raise ToolchainError(
                "options of `hptool targets show` come after its name, as in show NAME --json"
            )
        return
    if as_markdown and as_json:
        raise ToolchainError("--json and --markdown are two forms of one list; choose one")
    if as_markdown:
        from profiles.page import targets_markdown

        sys.stdout.write(targets_markdown())
        return
    profiles = [load_profile(name) for name in available_profiles()]
    data = {"targets": [asdict(profile) for profile in profiles]}
    _emit(data, as_json, lambda: _show_targets(profiles))


@targets_app.command("show")
def show_target(
    name: Annotated[str, typer.Argument(help="Name of a target, or path of a .toml file of your own.")],
    as_json: Json = False,
) -> None:
    """Show all that is known of one device, and where it is from."""
    profile = load_profile(name)
    _emit(asdict(profile), as_json, lambda: _show_target(profile))


@app.command()
def fit(
    model: Annotated[
        str, typer.Argument(help="A model as for `compress`; of a published one or a directory, no weights.")
    ] = "shapes",
    target: Annotated[
        list[str] | None, typer.Option("--target", "-t", help="Device profile; may repeat; default: all.")
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="Of the weights: 4, 8 or 16; default: each device's own.")
    ] = None,
    ratio: Annotated[
        float, typer.Option(help="Share of the transformer's parameters to take for gone.", min=0, max=0.9)
    ] = 0.0,
    remove: Remove = None,
    without: WithoutT5 = None,
    as_json: Json = False,
) -> None:
    """Say on which devices a model fits, and what would have to go for the rest; needs no weights."""
    from export.fit import fit as measure
    from toolchain.families import open_model

    opened = open_model(model, precision="config")
    if without == "t5":
        opened = opened.without_t5()
    if remove is not None:
        opened = opened.without_units(parse_units(remove, opened.geometry))
    profiles = [load_profile(name) for name in dict.fromkeys(target or available_profiles())]
    with _bars() as bar:
        found = measure(opened, profiles, bits=_fit_bits(bits), ratio=ratio, bar=bar)
    _emit(asdict(found), as_json, lambda: _show_fit(found))


@app.command()
def doctor(
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", "-t", help="Target or .toml file to judge by; default: all that come along."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what this machine can export and run, and what to install for the rest."""
    from deploy.doctor import find_faults, judge
    from deploy.machine import read_machine

    profiles = [load_profile(name) for name in dict.fromkeys(target or available_profiles())]
    machine = read_machine()
    faults = find_faults(machine)
    verdicts = [judge(machine, profile) for profile in profiles]
    data = {
        "machine": asdict(machine),
        "faults": [asdict(fault) for fault in faults],
        "targets": [asdict(verdict) for verdict in verdicts],
    }
    _emit(data, as_json, lambda: _show_health(machine, faults, verdicts))


def main() -> None:
    """Run the command line; the user's errors end in one message and exit code 2."""
    # What these libraries advise is meant for who calls them, and of no use to who types a command.
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    try:
        app()
    except (ToolchainError, ExportError, DeployError, ProfileError) as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA_OF:
            raise
        extra = _EXTRA_OF[package]
        _fail(f"this command needs {package}, which is not installed: pip install 'hptool[{extra}]'")


def print_(what: Any) -> None:
    """Show a person something on standard output."""
    # Text is not cut at the width of the terminal: a path has to stay whole to be copied.
    Console(highlight=False).print(what, soft_wrap=isinstance(what, str))


def _fail(message: str) -> None:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)


def _emit(data: dict[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    if as_json:
        sys.stdout.write(json.dumps(data, indent=2, default=str) + "\n")
    else:
        show()


@contextmanager
def _bars() -> Iterator[Callable[[str, int], Callable[..., None]]]:
    """Progress bars on standard error: yields a function that adds one and returns how to advance it."""
    columns = (
        TextColumn("{task.description:<28}"),
        *(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=True)),
        TextColumn("{task.fields[note]}"),
    )
    progress = Progress(*columns, console=_console)

    def add(description: str, total: int) -> Callable[..., None]:
        progress.start()  # not before there is a bar: even an empty display prints a line
        task = progress.add_task(description, total=total, note="")

        def advance(*_: object, note: str = "") -> None:
            progress.update(task, advance=1, note=note)

        return advance

    try:
        yield add
    finally:
        if progress.tasks:
            progress.stop()


def _name(model: str) -> str:
    return Path(model).resolve().name


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


def _fit_bits(bits: int | None) -> Literal[4, 8, 16] | None:
    if bits not in (None, 4, 8, 16):
        raise ToolchainError(f"--bits is 4, 8 or 16, not {bits}")
    return bits  # type: ignore[return-value]


def _engine_table(engines: list[dict[str, Any]]) -> Table:
    """Which engines there are, whom they serve, and where they lie."""
    table = Table("engine for", "compute capability", "MB", "INT4 found as stored", "where", title="engines")
    for engine in engines:
        built = engine["bytes"] is not None
        if engine["path"] is not None:
            where = engine["path"]
        elif built:
            where = "built here, in this machine's cache; other machines build their own"
        else:
            where = "built when it first runs there: this machine lacks that GPU or its TensorRT"
        table.add_row(
            ", ".join(engine["targets"]),
            ", ".join(engine["compute_capabilities"]),
            f"{engine['bytes'] / 1e6:.2f}" if built else "",
            f"{engine['num_found']} of {engine['num_int4']}" if built else "",
            where,
        )
    return table


def _bits(
    text: str | None, max_bytes: int | None, calibration: Calibration | None, group_size: int
) -> tuple[int | None, int | None]:
    """Bits as a number, None where they are the targets', and the bytes within which they are chosen."""
    if text == "auto":
        if calibration is None:
            raise ToolchainError("--bits auto needs --calibration; make one with `hptool calibrate`")
        return 4, max_bytes or calibration.uniform_bytes(group_size)
    if max_bytes is not None:
        raise ToolchainError("--max-bytes is for --bits auto")
    if text is None:
        return None, None
    if not text.isdecimal():
        raise ToolchainError(f"--bits is 4, 8, 16, 32 or auto, not {text!r}")
    return int(text), None


def _ratio_for(model: str, target: str) -> float:
    """The smallest share of the transformer whose removal lets a model fit on a device."""
    from export.fit import ModelSize, fit_target
    from toolchain.families import open_model

    profile = load_profile(target)
    with _bars() as bar:
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
    _console.print(
        f"{profile.name} holds {model} without {ratio:.0%} of its transformer, in {found.bits} bits"
    )
    return ratio


_MEMORY = Path(".hptool.json")


def _remember(*, student: Path) -> None:
    from toolchain.artifacts import write_json

    try:
        write_json(_MEMORY, {"schema_version": 1, "student": str(student)})
    except OSError as error:
        _console.print(
            f"note: {_MEMORY} cannot be written here ({error.strerror}); name {student} to export it"
        )


def _remembered_student() -> str:
    from toolchain.artifacts import read_json

    if not _MEMORY.exists():
        raise ToolchainError(
            "nothing was compressed in this directory yet; run `hptool compress` first, or name the model"
        )
    student = read_json(_MEMORY).get("student")
    if not isinstance(student, str):
        raise ToolchainError(
            f"{_MEMORY} was not written by hptool; name the model to export, or remove that file"
        )
    return student


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


def _show_score(model: str, score: ShapesScore) -> None:
    table = Table("task", "score", title=f"ShapesEval of {model}, {score.num_per_task} captions a task")
    for task, value in score.tasks.items():
        table.add_row(task, f"{value:.3f}")
    table.add_row("mean", f"{score.mean:.3f} ± {score.standard_error:.3f}", style="bold")
    print_(table)


def _show_bench(found: Bench) -> None:
    title = f"{found.width} x {found.height}, {found.steps} steps, {found.target} ({found.runtime})"
    headings = (Column(text, justify="right") for text in ("p50, ms", "p95, ms", "fewest, ms"))
    table = Table("", *headings, title=title)
    for name, spread in found.parts_ms.items():
        times = (spread.p50, spread.p95, spread.fewest)
        table.add_row(name.replace("_", " "), *(f"{item:.1f}" for item in times))
    print_(table)
    peak = "" if found.peak_bytes is None else f"; at most {decimal(found.peak_bytes)} of memory"
    print_(
        f"{found.repeats} pictures after the first, which took {found.cold_ms / 1000:.1f} s from nothing"
        f"{peak}."
    )


def _show_fit(found: Fit) -> None:
    parts = Table(
        "part",
        *(Column(text, justify="right") for text in ("parameters", "16 bits", "8 bits", "4 bits")),
        title=found.model,
    )
    for name, part in found.parts.items():
        parts.add_row(name, f"{part.parameters:,}", *(decimal(part.stored[bits]) for bits in (16, 8, 4)))
    print_(parts)
    headings = (
        "memory",
        "needed",
        "in turn",
        "of the host",
        "16 bits",
        "8 bits",
        "4 bits",
        "a step, at least",
    )
    table = Table("target", *(Column(text, justify="right") for text in headings), "verdict")
    for item in found.targets:
        least = [item.least_ratio[bits] for bits in (16, 8, 4)]
        table.add_row(
            item.target,
            *map(decimal, (item.available, item.together, item.in_turn)),
            decimal(item.host) if item.host else "",
            *("no" if ratio is None else f"{ratio:.0%}" for ratio in least),
            f"{item.least_step_seconds:.2g} s",
            item.verdict if not item.missing else f"too large by {decimal(item.missing)}",
        )
    print_(table)
    print_(
        "Needed: with all parts loaded, and with one at a time. Under 16, 8 and 4 bits: the share of the "
        "transformer that has to go for it to fit. A step: what the device's peak rates allow, no forecast.\n"
        f"Export: {decimal(found.export_memory)} of memory, {decimal(found.engine_memory)} to build an "
        f"engine, {decimal(found.export_disk)} of disk."
    )


def _show_targets(profiles: list[Profile]) -> None:
    table = Table(title="hptool export --target TARGET", box=None, pad_edge=False)
    for heading in ("target", "device"):
        table.add_column(heading, no_wrap=heading == "target")
    for heading in ("GiB", "GB/s", "TFLOPS"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("best runtime", "CUDA"):
        table.add_column(heading, no_wrap=True)
    for profile in profiles:
        numbers = (profile.memory_gib, profile.bandwidth_gb_s, profile.peak_tflops)
        table.add_row(
            profile.name,
            profile.description,
            *(f"{number:g}" for number in numbers),
            profile.runtimes[0],
            profile.compute_capability or "-",
        )
    print_(table)
    print_(
        "\nMemory, its bandwidth, the peak rate of multiply-accumulates; CUDA is the compute capability.\n"
        "What they mean and where they are from:  hptool targets show TARGET"
    )


def _show_target(profile: Profile) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for field, doc in field_docs().items():
        if field == "sources":
            continue
        value = getattr(profile, field)
        if isinstance(value, tuple):
            value = ", ".join(map(str, value))
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        first_sentence = doc.partition(". ")[0].removesuffix(".") + "."
        source = f"\nFrom: {profile.sources[field]}" if field in profile.sources else ""
        # As text, so that brackets in a profile are no markup.
        table.add_row(field, Text.assemble(shown or "-", (f"\n{first_sentence}{source}", "dim")))
    print_(table)


def _show_health(machine: Machine, faults: list[Fault], verdicts: list[Verdict]) -> None:
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(machine):
        facts.add_row(name, Text(value))
    print_(facts)
    for fault in faults:
        print_(Text(f"\nBroken: {fault.what}.\nTo mend it:  {fault.fix}", "bold"))
    table = Table(title="\nWhat this machine can do", box=None, pad_edge=False)
    for heading in ("target", "export", "build the engine", "run a bundle with"):
        table.add_column(heading, no_wrap=True)
    obstacles: dict[str, list[str]] = {}
    commands: dict[tuple[str, ...], list[str]] = {}
    for verdict in verdicts:
        engine = "-" if verdict.engine is None else _yes(verdict.engine)
        table.add_row(verdict.target, _yes(verdict.export), engine, verdict.runtime or "nothing")
        for obstacle in verdict.obstacles:
            obstacles.setdefault(obstacle, []).append(verdict.target)
        if verdict.install:
            commands.setdefault(verdict.install, []).append(verdict.target)
    print_(table)
    for obstacle, names in obstacles.items():
        print_(Text(f"\n{obstacle}\n    {', '.join(names)}"))
    for install, names in commands.items():
        print_(Text(f"\nTo do all that this machine can for {', '.join(names)}:"))
        for command in install:
            print_(Text(f"    {command}"))


def _facts(machine: Machine) -> Iterator[tuple[str, str]]:
    instructions = ("of unknown instructions",) if machine.instructions is None else machine.instructions
    yield "Python", machine.python
    yield "system", machine.platform
    yield "processor", ", ".join((machine.processor, f"{machine.num_cores} cores", *instructions))
    sizes = (machine.memory_bytes, machine.available_bytes)
    total, available = ("unknown" if size is None else decimal(size) for size in sizes)
    yield "memory", f"{total}, available {available}"
    yield "disk", f"{decimal(machine.disk_bytes)} free at {machine.cache}"
    for gpu in machine.gpus.devices:
        yield "GPU", f"{gpu.name}, compute capability {gpu.compute_capability}, {decimal(gpu.memory_bytes)}"
    if not machine.gpus.devices:
        yield "GPU", "none that CUDA sees"
    if machine.gpus.cuda_version is not None:
        yield (
            "driver",
            f"{machine.gpus.driver_version or 'of unknown version'}, for CUDA {machine.gpus.cuda_version}",
        )
    yield "packages", ", ".join(f"{name} {version}" for name, version in machine.packages.items()) or "none"
    yield "providers", ", ".join(machine.providers) or "none"
    complete = [extra for extra, missing in machine.missing.items() if not missing]
    yield "hptool's extras", ", ".join(complete) or "none complete"


def _yes(able: bool) -> str:
    return "yes" if able else "no"


if __name__ == "__main__":
    main()
