"""What machines are and can do: targets, fit, doctor."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.filesize import decimal
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from profiles.schema import Profile, available_profiles, load_profile
from profiles.typed import field_docs
from toolchain.cli.shell import Json, Remove, WithoutT5, app, bars, emit, print_
from toolchain.errors import ToolchainError
from toolchain.garbage import uncollected
from toolchain.rules import parse_units

if TYPE_CHECKING:
    from deploy.doctor import Fault, Verdict
    from deploy.machine import Machine
    from export.fit import Fit

_SHORT = {"fits": "fits", "fits, one part at a time": "fits in turn"}
_WORDS = {"device", "CUDA", "best runtime", "export", "build the engine", "run a bundle with", "verdict"}
"""Headings of what is no number."""
_WAYS = {
    "text_encoder_3": " (--without t5 leaves it out)",
    "vae": " (less for smaller pictures: buckets of a profile of your own)",
}

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
    emit(data, as_json, lambda: _show_targets(profiles))


@targets_app.command("show")
def show_target(
    name: Annotated[str, typer.Argument(help="Name of a target, or path of a .toml file of your own.")],
    as_json: Json = False,
) -> None:
    """Show all that is known of one device, and where it is from."""
    profile = load_profile(name)
    emit(asdict(profile), as_json, lambda: _show_target(profile))


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
    with uncollected():
        from export.fit import fit as measure
        from toolchain.families import open_model

        opened = open_model(model, precision="config")
    if without == "t5":
        opened = opened.without_t5()
    if remove is not None:
        opened = opened.without_units(parse_units(remove, opened.geometry))
    profiles = [load_profile(name) for name in dict.fromkeys(target or available_profiles())]
    with bars() as bar:
        found = measure(opened, profiles, bits=_fit_bits(bits), ratio=ratio, bar=bar)
    emit(asdict(found), as_json, lambda: _show_fit(found))


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
    emit(data, as_json, lambda: _show_health(machine, faults, verdicts))


def _fit_bits(bits: int | None) -> Literal[4, 8, 16] | None:
    if bits not in (None, 4, 8, 16):
        raise ToolchainError(f"--bits is 4, 8 or 16, not {bits}")
    return bits  # type: ignore[return-value]


def _show_fit(found: Fit) -> None:
    parts = _table(found.model, "part", "parameters", "16 bits", "8 bits", "4 bits")
    for name, part in found.parts.items():
        parts.add_row(name, f"{part.parameters:,}", *(decimal(part.stored[bits]) for bits in (16, 8, 4)))
    asked = dict.fromkeys(f"{item.bits} bits, {item.height} x {item.width} pixels" for item in found.targets)
    memory = _table("; ".join(asked), "target", "memory", "all parts", "in turn", "host", "verdict")
    rest = _table(
        "What has to go, and what else it takes",
        *("target", "16 bits", "8 bits", "4 bits", "activations", "disk", "step ≥"),
    )
    for item in found.targets:
        memory.add_row(
            item.target,
            *map(decimal, (item.available, item.together, item.in_turn)),
            decimal(item.host) if item.host else "-",
            _SHORT.get(item.verdict) or f"too large: {decimal(item.missing)}",
        )
        ratios = [item.least_ratio[bits] for bits in (16, 8, 4)]
        rest.add_row(
            item.target,
            *("no" if ratio is None else f"{ratio:.0%}" for ratio in ratios),
            *map(decimal, (item.activations, item.disk)),
            _duration(item.least_step_seconds),
        )
    print_(parts)
    print_("")
    print_(memory)
    print_(
        "Needed with all parts loaded, and with one at a time. Host: of the computer's, by\n"
        "a GPU with memory of its own.\n"
    )
    print_(rest)
    print_(
        "Under 16, 8 and 4 bits: the least of the transformer that has to go, up to a half.\n"
        "Step: an estimate from the device's peak rates; a real one takes longer."
    )
    for item in found.targets:
        if item.floor > item.available:
            most = item.floor_part + _WAYS.get(item.floor_part, "")
            print_(
                f"\n{item.target} cannot hold it: in 4 bits and without half of the transformer it still "
                f"takes {decimal(item.floor)}, most of all for {most}."
            )
    print_(
        f"\nExport: {decimal(found.export_memory)} of memory, {decimal(found.engine_memory)} to build an "
        f"engine, {decimal(found.export_disk)} of disk."
    )


def _table(title: str, name: str, *headings: str) -> Table:
    """A table in which a long name is folded, and nothing is cut short."""
    columns = (Column(text, justify="left" if text in _WORDS else "right", no_wrap=True) for text in headings)
    first = Column(name, overflow="fold")
    return Table(first, *columns, title=Text(title), title_justify="left", box=None, pad_edge=False)


def _duration(seconds: float) -> str:
    number, unit = (seconds, "s") if seconds >= 1 else (1000 * seconds, "ms")
    return f"{number:.0f} {unit}" if number >= 10 else f"{number:.2g} {unit}"


def _show_targets(profiles: list[Profile]) -> None:
    table = _table("hptool export --target TARGET", "target", "device", "GiB", "CUDA", "best runtime")
    for profile in profiles:
        table.add_row(
            profile.name,
            Text(profile.description),
            f"{profile.memory_gib:g}",
            profile.compute_capability or "-",
            profile.runtimes[0],
        )
    print_(table)
    print_(
        "\nCUDA is the compute capability. All that is known of one, and where it is from:\n"
        "hptool targets show TARGET"
    )


def _show_target(profile: Profile) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for field, doc in field_docs(Profile).items():
        if field == "sources":
            continue
        value = getattr(profile, field)
        if isinstance(value, tuple):
            value = ", ".join(map(str, value))
        elif isinstance(value, bool):
            value = _yes(value)
        shown = f"{value:g}" if isinstance(value, float) else "" if value is None else str(value)
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
    headings = ("target", "export", "build the engine", "run a bundle with")
    table = _table("What this machine can do", *headings)
    obstacles: dict[str, list[str]] = {}
    commands: dict[tuple[str, ...], list[str]] = {}
    for verdict in verdicts:
        engine = "-" if verdict.engine is None else _yes(verdict.engine)
        table.add_row(verdict.target, _yes(verdict.export), engine, verdict.runtime or "nothing")
        for obstacle in verdict.obstacles:
            obstacles.setdefault(obstacle, []).append(verdict.target)
        if verdict.install:
            commands.setdefault(verdict.install, []).append(verdict.target)
    print_("")
    print_(table)
    for obstacle, names in obstacles.items():
        print_(Text(f"\n{obstacle}"))
        print_(Padding(Text(", ".join(names)), (0, 0, 0, 4)))
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
