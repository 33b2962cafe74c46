"""What all stages left behind, as a page for people."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from profiles.schema import available_profiles, load_profile
from toolchain.cli.shell import Json, Prompts, app, bars, emit, name_of, print_


@app.command()
def report(
    run: Annotated[
        list[Path], typer.Argument(help="A student, a bundle, or both; of one the other is looked for.")
    ],
    bench: Annotated[
        list[Path] | None, typer.Option(help="What `hptool bench --json` printed elsewhere; may repeat.")
    ] = None,
    fit: Annotated[
        list[Path] | None, typer.Option(help="What `hptool fit --json` printed; may repeat.")
    ] = None,
    score: Annotated[
        list[Path] | None,
        typer.Option(help="What `hptool evaluate --json` printed of the bundle; may repeat."),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", "-t", help="Device to fit on; may repeat; default: the bundle's, or all."),
    ] = None,
    prompts: Prompts = None,
    measure: Annotated[
        bool | None,
        typer.Option(help="Paint, score and time here; default: where that takes a minute or two."),
    ] = None,
    pngs: Annotated[bool, typer.Option("--pngs", help="Write its pictures beside it, too.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="HTML file to write.")] = None,
    as_json: Json = False,
) -> None:
    """Show on one page what was removed, what it cost and what it gained."""
    from report.evidence import read_evidence
    from report.measure import is_quick
    from report.measure import measure as look
    from report.page import render_page
    from report.pictures import draw_all
    from toolchain.artifacts import write_text

    evidence = read_evidence(run, benches=bench or (), fits=fit or (), scores=score or ())
    named = target
    if not named and evidence.bundle is not None:
        named = [variant.target for variant in evidence.bundle.bundle.manifest.variants]
    targets = [load_profile(name) for name in dict.fromkeys(named or available_profiles())]
    path = output or Path(f"{name_of(str(run[0]))}-report.html")
    paint = is_quick(evidence) if measure is None else measure
    with bars() as bar:
        found = look(evidence, prompts=prompts, targets=targets, paint=paint, bar=bar)
    write_text(path, render_page(evidence, found))
    drawn = draw_all(evidence, found, path) if pngs else []

    def show() -> None:
        for note in found.notes:
            print_(note)
        print_(f"Written to {', '.join(map(str, (path, *drawn)))}")

    facts = {
        "report": str(path),
        "pngs": list(map(str, drawn)),
        "scores": {name: asdict(item) for name, item in found.scores.items()},
        "steps_ms": {name: asdict(item) for name, item in found.steps_ms.items()},
        "benches": {name: asdict(item) for name, item in found.benches.items()},
        "notes": found.notes,
    }
    emit(facts, as_json, show)
