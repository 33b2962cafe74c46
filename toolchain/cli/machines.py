"""What machines are and can do: targets, fit, doctor."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.filesize import decimal
from rich.table import Column, Table
from rich.text import Text

from profiles.schema import Profile, available_profiles, field_docs, load_profile
from toolchain.cli.shell import Json, Remove, WithoutT5, app, bars, emit, print_
from toolchain.errors import ToolchainError
from toolchain.rules import parse_units

if TYPE_CHECKING:
    from deploy.doctor import Fault, Verdict
    from deploy.machine import Machine
    from export.fit import Fit

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
