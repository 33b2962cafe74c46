"""From a student to a bundle: calibrate, export."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from profiles.schema import load_profile
from toolchain.cli.shell import (
    Json,
    NumPrompts,
    Prompts,
    Seed,
    WeightsIn,
    WithoutT5,
    app,
    bars,
    emit,
    print_,
    remembered_student,
)
from toolchain.errors import ToolchainError
from toolchain.garbage import uncollected
from toolchain.plan import PLAN_FILE

if TYPE_CHECKING:
    from export.calibration import Calibration


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

    source = student or remembered_student()
    directory = output or Path(Path(source).resolve().name.removesuffix("-student") + "-calibration")
    model = open_model(source, precision=precision)
    with bars() as bar:
        asked = analysis_prompts(model, prompts, num_prompts, seed=seed)
        found = measure(model, asked, directory, seed=seed, bar=bar)
    worst = sorted(found.harms, key=lambda item: -item.error4)[:10]

    def show() -> None:
        table = Table("weight", "harm in 4 bits", "in 8", title=f"what rounding harms most in {source}")
        for item in worst:
            table.add_row(item.name, f"{item.error4:.2e}", f"{item.error8:.2e}")
        print_(table)
        print_(f"Use it:  hptool export {source} --calibration {directory} --bits auto")

    emit({"calibration": str(directory), "worst": [asdict(item) for item in worst]}, as_json, show)


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
    compare: Annotated[
        bool,
        typer.Option(
            help="Whether graphs are compared with torch before they are kept, which takes longer than "
            "writing them."
        ),
    ] = True,
    without: WithoutT5 = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory to write the bundle to.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Lower a model to ONNX with INT4 weights, build engines, and bundle it all for a device."""
    targets = [load_profile(name) for name in dict.fromkeys(target or ["cpu-x86"])]
    source = student or remembered_student()
    bundle_path = output or Path(Path(source).resolve().name.removesuffix("-student") + "-bundle")

    from toolchain.artifacts import check_new_directory, read_json, sha256
    from toolchain.card import read_card
    from toolchain.plan import plan_from_json

    check_new_directory(bundle_path)
    if max_error is not None and not compare:
        raise ToolchainError(
            "--max-error is what comparing accepts, and --no-compare compares nothing; leave one of them out"
        )

    from deploy.kept import cache_directory
    from export.digests import FileDigests

    digests = FileDigests(cache_directory())
    # Importing all that follows takes one core as long as reading half a checkpoint takes another.
    with digests.ahead(_transformer_files(source)):
        with uncollected():
            from export.bundle import export_bundle
            from export.cache import ComponentCache
            from export.calibration import read_calibration
            from export.engine import ENGINES
            from toolchain.families import open_model

            model = open_model(source, precision="none")  # it imports the model's libraries
        if without == "t5":
            model = model.without_t5()
        path = model.path / PLAN_FILE
        plan = plan_from_json(read_json(path)) if path.exists() else None
        card = read_card(model.path)
        known = None if calibration is None else read_calibration(calibration, model)
        number, budget = _bits(bits, max_bytes, known, targets[0].group_size)
        with bars() as bar:
            bundle = export_bundle(
                model,
                targets=targets,
                output=bundle_path,
                bits=number,
                bits_of_components=None if plan is None else plan.student_bits,
                calibration=known,
                max_bytes=budget,
                most_error=max_error,
                compare=compare,
                cache=ComponentCache(cache_directory(), digests),
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
        if not compare:
            print_("Nothing was compared with torch: export without --no-compare before you rely on it.")
        print_(f"Run it:  hptool run {bundle_path} 'a red circle left of a blue square' -o out.png")

    facts = {
        "bundle": str(bundle_path),
        "compared": compare,
        "files": files,
        "variants": variants,
        "engines": engines,
    }
    emit(facts, as_json, show)


def _transformer_files(source: str) -> list[Path]:
    """Those of a model that is a directory; none where something is wrong, of which opening it will tell."""
    from toolchain.families.stored import weight_files

    try:
        return weight_files(Path(source) / "transformer")
    except ToolchainError:
        return []


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


def _engine_table(engines: list[dict[str, Any]]) -> Table:
    """Which engines there are, whom they serve, and where they lie."""
    where_it_lies = Column("where", overflow="fold")
    table = Table(
        "engine for", "compute capability", "MB", "INT4 found as stored", where_it_lies, title="engines"
    )
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
