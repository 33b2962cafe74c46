"""What it takes to bring transformers of 6 and 8 billion parameters from a checkpoint to a device.

    python -m benchmarks.scale_export run           # measure what is missing; stop and start it at will
    python -m benchmarks.scale_export table         # docs/scale.md from what was measured

Every row runs in processes of its own, which are watched: `hptool export`, an engine's build, a step of
denoising. Weights are random, with the geometry of the published models less the removed blocks; time, memory
and bytes depend on that alone. Checkpoints, bundles and caches go into `--scratch`, which has to hold 60 GB:
those of a model are removed when all of it is measured. Leave the machine alone meanwhile.

The ordinary way (benchmarks/ordinary.py) is tried at falling depths until one survives, and `hptool export`
is measured on that same model.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.machine import machine
from benchmarks.watch import Watched, drop_from_cache, seconds_to_read, watch
from toolchain.artifacts import read_json, write_json

RESULTS = Path(__file__).parent / "results" / "scale_export.json"
PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
GIB, GB = 2**30, 10**9

SIDE = 32
"""Latents on a side in a step: pictures of 256 x 256."""
REPEATS = 3
ORDINARY = "ordinary"
ORDINARY_MODEL = "sd3.5-large-turbo"
ORDINARY_MOST_BYTES = 20 * GIB
ORDINARY_DEPTHS = (16, 12, 8, 4)
"""Not 38, nor 24: their weights alone take more in float32."""
FREE_DISK, ORDINARY_DISK = 10 * GB, 35 * GB
"""What the ordinary way has to leave, and what it is given to begin with."""
MOST_SECONDS = 3 * 3600
PROMPT = "a red circle left of a blue square"

# A device that takes the float16 graph and no engine, so that the engine can be built by itself.
_HALF = """name = "half"
description = "onnxruntime with activations of 16 bits"
extends = "rtx4090"
runtimes = ["onnxruntime-tensorrt"]
max_batch = 1
"""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and what is asked of it."""

    title: str
    directory: str
    """Of the checkpoint in the scratch directory; what else belongs to it is named after it."""
    rows: tuple[str, ...] = ("write", "export", "engine", "step", "run")
    """What is measured of it."""
    most_onnx_bytes: float = math.inf
    most_engine_memory: float = math.inf


SUBJECTS = {
    "sd3.5-large-turbo-pruned": Subject(
        title="SD3.5-Large-Turbo without blocks 25-28, 31-34",
        directory="sd35",
        most_onnx_bytes=3.5e9,
        most_engine_memory=16 * GIB,
    ),
    "flux.1-schnell-pruned": Subject(
        title="FLUX.1-schnell, 30 % removed",
        directory="flux",
        most_onnx_bytes=5.0e9,
        most_engine_memory=22 * GIB,
    ),
    "t5-xxl": Subject(title="T5-XXL, and 2 blocks of SD3.5-Large", directory="t5", rows=("write", "export")),
}
MOST_EXPORT_MEMORY = 2.5 * GIB
MOST_EXPORT_READS, MOST_EXPORT_SECONDS = 6, 600
MOST_ENGINE_SHARE = 1.1
MOST_STEP_SHARE = 1.35
STEP_SPEED = 1.1
"""A step counts as of pre-packed speed up to so many times the seconds of one with pre-packed weights."""

Row = dict[str, Any]
app = typer.Typer(add_completion=False, no_args_is_help=True)
Scratch = Annotated[Path, typer.Option(help="Directory for checkpoints, bundles and caches.")]
DEFAULT_SCRATCH = Path("build") / "scale"


class MeasurementError(RuntimeError):
    """A command that was to succeed did not."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one model's things are."""

    scratch: Path
    name: str

    @property
    def checkpoint(self) -> Path:
        """The model's directory."""
        return self.scratch / self.name

    @property
    def bundle(self) -> Path:
        """What `hptool export --target cpu-x86` wrote."""
        return self.scratch / f"{self.name}-bundle"

    @property
    def half_bundle(self) -> Path:
        """The same with a float16 graph."""
        return self.scratch / f"{self.name}-half-bundle"

    @property
    def environment(self) -> dict[str, str]:
        """Keeps what the commands remember out of the user's own caches."""
        cache = str((self.scratch / f"{self.name}-cache").resolve())
        return {"HPTOOL_CACHE": cache, "XDG_CACHE_HOME": cache}

    def forget(self) -> None:
        """Have the next command begin from nothing."""
        shutil.rmtree(self.environment["HPTOOL_CACHE"], ignore_errors=True)

    def clear(self) -> None:
        """Remove all there is."""
        self.forget()
        for path in (self.checkpoint, self.bundle, self.half_bundle):
            shutil.rmtree(path, ignore_errors=True)

    @property
    def weight_files(self) -> list[Path]:
        """All weights of the checkpoint."""
        return sorted(self.checkpoint.glob("*/*.safetensors"))


def measure_write(place: Place) -> Row:
    """`hptool export --no-compare`."""
    return _measure_export(place, "--no-compare")


def measure_export(place: Place) -> Row:
    """`hptool export`, which compares what it wrote with torch."""
    return _measure_export(place) | {"parity": _parity(place.bundle)}


def _measure_export(place: Place, *options: str) -> Row:
    """From a cold start, beside the time that reading alone takes."""
    files = place.weight_files
    reads = [seconds_to_read(files) for _ in range(REPEATS)]
    watched = _export(place, "cpu-x86", place.bundle, *options)
    place.forget()  # its copies of the bundle's files only take room now
    return {
        "checkpoint_bytes": sum(path.stat().st_size for path in files),
        "seconds_to_read": statistics.median(reads),
        "reads": reads,
        **_measured(watched),
        "stages": _stages(watched.errors),
        "transformer_bytes": _graph_bytes(place.bundle, "model.onnx"),
        "bundle_bytes": sum(path.stat().st_size for path in place.bundle.rglob("*") if path.is_file()),
    }


def measure_engine(place: Place) -> Row:
    """An engine for compute capability 8.9, from the float16 graph, which is exported first."""
    if not place.half_bundle.exists():
        profile = place.scratch / "half.toml"
        profile.write_text(_HALF, encoding="utf-8")
        _export(place, str(profile), place.half_bundle)
    place.forget()
    engine = place.scratch / f"{place.name}.engine"
    engine.unlink(missing_ok=True)
    watched = _step("build-engine", str(place.half_bundle), str(engine))
    engine_bytes = engine.stat().st_size
    engine.unlink()
    shutil.rmtree(place.half_bundle)
    found = _last_json(watched)
    return {**_measured(watched), "engine_bytes": engine_bytes, **found}


def measure_step(place: Place) -> Row:
    """A denoising step, as the device opens the transformer and as onnxruntime does by itself."""
    _require(place.bundle)
    place.forget()
    environment = place.environment
    ways = {}
    # What the device prepares when it opens a bundle for the first time is there when it does again.
    for name, way in (("first", "device"), ("device", "device"), ("plain", "plain")):
        watched = _step("one-step", str(place.bundle), way, environment=environment)
        ways[name] = _last_json(watched) | {
            "peak_bytes": watched.peak_bytes,
            "peak_anonymous_bytes": watched.peak_anonymous_bytes,
        }
    return {"weight_bytes": _graph_bytes(place.bundle, "model.onnx"), **ways}


def measure_run(place: Place) -> Row:
    """`hptool run` of one step."""
    _require(place.bundle)
    picture = place.scratch / f"{place.name}.png"
    size = str(8 * SIDE)
    options = [
        "--runtime",
        "onnxruntime-cpu",
        "--steps",
        "1",
        "--height",
        size,
        "--width",
        size,
        "--output",
        str(picture),
    ]
    command = [*_hptool("run"), str(place.bundle), PROMPT, *options]
    watched = _succeeded(watch(command, environment=place.environment))
    place.forget()  # what opening prepared takes twice the bundle's size
    return _measured(watched)


MEASURES: dict[str, Callable[[Place], Row]] = {
    "write": measure_write,
    "export": measure_export,
    "engine": measure_engine,
    "step": measure_step,
    "run": measure_run,
}


def measure_ordinary(scratch: Path, model: str, depths: tuple[int, ...], group_size: int) -> Row:
    """The ordinary way at falling depths until it survives, then `hptool export` of that model."""
    if (free := shutil.disk_usage(scratch).free) < ORDINARY_DISK:
        raise MeasurementError(
            f"{scratch} has {free / GB:.0f} GB free, and this takes {ORDINARY_DISK / GB:.0f}"
        )
    attempts = []
    for blocks in depths:
        place = Place(scratch=scratch, name=f"{model}-{blocks}")
        shutil.rmtree(place.checkpoint, ignore_errors=True)
        _make(model, place.checkpoint, blocks)
        files = place.weight_files
        output = scratch / "ordinary"
        shutil.rmtree(output, ignore_errors=True)
        _only_program_in_cache(files)
        options = [str(place.checkpoint), str(output), "--group-size", str(group_size)]
        watched = watch(
            [sys.executable, "-m", "benchmarks.ordinary", *options],
            most_bytes=ORDINARY_MOST_BYTES,
            most_seconds=MOST_SECONDS,
            least_free_disk=(scratch, FREE_DISK),
        )
        attempt = {"blocks": blocks, **_measured(watched), "stopped": watched.stopped}
        if watched.stopped is None and watched.status:
            attempt["stopped"] = _failure(watched)
        if attempt["stopped"] is None:
            names = (output / "model.onnx", output / "model.onnx.data")
            attempt["transformer_bytes"] = sum(path.stat().st_size for path in names)
        shutil.rmtree(output, ignore_errors=True)
        attempts.append(attempt)
        print(f"  {blocks} blocks: {attempt['stopped'] or 'survived'}", flush=True)
        if attempt["stopped"] is None:
            shutil.rmtree(place.bundle, ignore_errors=True)
            ours = _measured(_export(place, "cpu-x86", place.bundle))
            ours["transformer_bytes"] = _graph_bytes(place.bundle, "model.onnx")
            for path in (place.bundle, place.checkpoint):
                shutil.rmtree(path)
            place.forget()
            ratios = {name: attempt[name] / ours[name] for name in ("peak_bytes", "seconds")}
            return {"attempts": attempts, "blocks": blocks, "hptool": ours, "ratios": ratios}
        shutil.rmtree(place.checkpoint)
    return {"attempts": attempts, "blocks": None, "hptool": None, "ratios": None}


def _export(place: Place, target: str, output: Path, *options: str) -> Watched:
    shutil.rmtree(output, ignore_errors=True)
    place.forget()
    _only_program_in_cache(place.weight_files)
    command = [
        *_hptool("export"),
        str(place.checkpoint),
        *("--target", target),
        *("--output", str(output)),
        *options,
        "--json",
    ]
    return _succeeded(watch(command, environment=place.environment))


def _only_program_in_cache(files: list[Path]) -> None:
    drop_from_cache(files)
    # Reading a checkpoint again and again has put it out as well.
    subprocess.run([sys.executable, "-c", "import export.bundle, nncf"], check=True, capture_output=True)


def _hptool(command: str) -> list[str]:
    return [sys.executable, "-m", "toolchain", command]


def _step(command: str, *arguments: str, environment: dict[str, str] | None = None) -> Watched:
    program = [sys.executable, "-m", "benchmarks.scale_steps", command, *arguments]
    return _succeeded(watch(program, environment=environment))


def _make(model: str, directory: Path, blocks: int | None = None) -> None:
    depth = [] if blocks is None else ["--blocks", str(blocks)]
    _succeeded(watch([sys.executable, "-m", "benchmarks.synthetic", model, str(directory), *depth]))


def _succeeded(watched: Watched) -> Watched:
    if watched.stopped or watched.status:
        raise MeasurementError(_failure(watched))
    return watched


def _failure(watched: Watched) -> str:
    """Why, in a line; the rest goes to the terminal."""
    print(watched.errors, file=sys.stderr)
    lines = [line for line in watched.errors.splitlines() if line.strip()] or ["nothing on standard error"]
    return f"ended with status {watched.status}: {lines[-1].strip()}"


def _measured(watched: Watched) -> Row:
    return {
        "seconds": watched.seconds,
        "peak_bytes": watched.peak_bytes,
        "peak_anonymous_bytes": watched.peak_anonymous_bytes,
        "peak_file_bytes": watched.peak_file_bytes,
    }


def _stages(progress: str) -> dict[str, int]:
    """Seconds of each stage, by what its progress bar ended with."""
    bars = re.findall(r"^(\S.*?) +━+ +\d+/\d+ +(\d+):(\d\d):(\d\d)", progress, re.MULTILINE)
    return {name: 3600 * int(hours) + 60 * int(minutes) + int(rest) for name, hours, minutes, rest in bars}


def _last_json(watched: Watched) -> Row:
    found: Row = json.loads(watched.output.strip().splitlines()[-1])
    return found


def _graph_bytes(bundle: Path, graph: str) -> int:
    """Of the transformer's graph and the weights it shares with others."""
    files = [
        path for path in (bundle / "transformer").iterdir() if path.name == graph or path.suffix != ".onnx"
    ]
    return sum(path.stat().st_size for path in files)


def _parity(bundle: Path) -> list[Row]:
    """The transformer's rows of the bundle's own report."""
    rows: list[Row] = read_json(bundle / "parity.json")["rows"]
    return [row for row in rows if row.get("stage") == "transformer"]


def _require(bundle: Path) -> None:
    if not bundle.exists():
        raise MeasurementError(
            f"{bundle} is not there; measure the row `export` in the same command, or before it with --keep"
        )


def _machine() -> Row:
    from importlib.metadata import PackageNotFoundError, version

    found: Row = dict(machine())
    for name in ("onnx", "onnx-ir", "onnxscript", "polygraphy", "tensorrt-rtx-cu13"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return found


def load(path: Path) -> Row:
    """The results so far."""
    return read_json(path) if path.exists() else {"schema_version": 1, "rows": {}, "ordinary": None}


def place_of(scratch: Path, model: str) -> Place:
    """Where a model's things are; one that is no subject has its own name there."""
    return Place(scratch=scratch, name=SUBJECTS[model].directory if model in SUBJECTS else model)


Models = Annotated[list[str] | None, typer.Option("--model", help="Only these; may repeat.")]


@app.command()
def run(
    scratch: Scratch = DEFAULT_SCRATCH,
    results: Annotated[Path, typer.Option(help="Where the numbers go.")] = RESULTS,
    models: Models = None,
    rows: Annotated[
        list[str] | None, typer.Option("--row", help="Only these, anew if they are there; may repeat.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Remove neither checkpoints nor bundles.")] = False,
) -> None:
    """Measure every row that is missing."""
    known = (*MEASURES, ORDINARY)
    for name in rows or ():
        if name not in known:
            raise typer.BadParameter(f"there is no row {name!r}; there are {', '.join(known)}")
    scratch.mkdir(parents=True, exist_ok=True)
    found, failed = load(results), list[str]()

    def record(into: Row, name: str, title: str, measure: Callable[[], Row]) -> None:
        print(title, flush=True)
        try:
            into[name] = measure() | {"machine": _machine()}
        except MeasurementError as failure:  # other rows may not need this one
            print(f"  {failure}", flush=True)
            failed.append(title)
        else:
            write_json(results, found)

    def missing(own: Row, names: Iterable[str]) -> list[str]:
        return [name for name in names if (name in rows if rows else own.get(name) is None)]

    for model in models or SUBJECTS:
        place, own = place_of(scratch, model), found["rows"].setdefault(model, {})
        names = SUBJECTS[model].rows if model in SUBJECTS else tuple(MEASURES)
        if chosen := missing(own, names):
            if not place.checkpoint.exists():
                print(f"{model}: its checkpoint", flush=True)
                _make(model, place.checkpoint)
            for name in chosen:
                record(own, name, f"{model}: {name}", partial(MEASURES[name], place))
        if not keep and set(names) <= set(own):
            place.clear()
    if missing(found, (ORDINARY,)):
        ordinary = partial(measure_ordinary, scratch, ORDINARY_MODEL, ORDINARY_DEPTHS, 64)
        record(found, ORDINARY, "the ordinary way", ordinary)
    if failed:
        print(f"not measured: {', '.join(failed)}", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def table(
    results: Annotated[Path, typer.Option(help="What `run` wrote.")] = RESULTS,
    output: Annotated[Path, typer.Option(help="Where the page goes.")] = PAGE,
) -> None:
    """Write the page."""
    text = page(load(results))
    output.write_text(text, encoding="utf-8")
    print(text)


_INTRODUCTION = """\
Made by `python -m benchmarks.scale_export table` of what `python -m benchmarks.scale_export run` measured.

Random weights of the published geometries in bfloat16, sharded; time, memory and bytes depend on that alone.
Each command ran in a process of its own that was looked at every 50 ms; an export began with the checkpoint
out of the page cache, the program in it and nothing of its own kept. Memory is what is resident, mapped
files included, unless it says otherwise."""

_ORDINARY_INTRODUCTION = f"""\
`torch.onnx.export` of the loaded model, then `nncf.compress_weights` (`benchmarks/ordinary.py`), on
SD3.5-Large with so many blocks of the real width, killed above {ORDINARY_MOST_BYTES / GIB:.0f} GiB, which
the weights of all 38 exceed in float32, and those of 24:"""


def page(found: Row) -> str:
    """The results as a document; a row that was not measured says so."""
    models = list(found["rows"])
    columns = [SUBJECTS[name].title if name in SUBJECTS else name for name in models]
    lines = [
        "# Export at full size",
        "",
        *_INTRODUCTION.splitlines(),
        "",
        *(f"- {line}" for line in _machines(found)),
        "",
        f"| | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for title, show in _ROWS:
        cells = [show(found["rows"][name], SUBJECTS.get(name)) for name in models]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", *_ordinary_lines(found["ordinary"])]
    return "\n".join(lines) + "\n"


_MISSING = "not measured"


def _write_memory(rows: Row, _: Subject | None) -> str:
    if (row := rows.get("write")) is None:
        return _MISSING
    shown = f"{row['peak_bytes'] / GIB:.2f} GiB ({row['peak_anonymous_bytes'] / GIB:.2f} without files)"
    return shown + _verdict(row["peak_bytes"] <= MOST_EXPORT_MEMORY)


def _write_time(rows: Row, _: Subject | None) -> str:
    if (row := rows.get("write")) is None:
        return _MISSING
    met = row["seconds"] <= min(MOST_EXPORT_READS * row["seconds_to_read"], MOST_EXPORT_SECONDS)
    storing = sum(seconds for name, seconds in row["stages"].items() if name.endswith(": weights"))
    return (
        f"{_in_reads(row)}{_verdict(met)}; {storing} s of it rounding and storing weights "
        f"({row['checkpoint_bytes'] / GB:.1f} GB read in {row['seconds_to_read']:.0f} s)"
    )


def _compared(rows: Row, _: Subject | None) -> str:
    if (row := rows.get("export")) is None:
        return _MISSING
    return f"{_in_reads(row)}, {row['peak_bytes'] / GIB:.2f} GiB"


def _in_reads(row: Row) -> str:
    """An export's time, and how often the checkpoint could be read meanwhile."""
    return f"{row['seconds']:.0f} s, {row['seconds'] / row['seconds_to_read']:.1f} × one read"


def _onnx_bytes(rows: Row, subject: Subject | None) -> str:
    if (row := rows.get("export")) is None:
        return _MISSING
    shown = f"{row['transformer_bytes'] / GB:.2f} GB"
    return shown + ("" if subject is None else _verdict(row["transformer_bytes"] <= subject.most_onnx_bytes))


def _engine_size(rows: Row, _: Subject | None) -> str:
    if (row := rows.get("engine")) is None:
        return _MISSING
    share = row["engine_bytes"] / row["onnx_bytes"]
    return f"{row['engine_bytes'] / GB:.2f} GB, {share:.3f} × ONNX{_verdict(share <= MOST_ENGINE_SHARE)}"


def _engine_build(rows: Row, subject: Subject | None) -> str:
    if (row := rows.get("engine")) is None:
        return _MISSING
    shown = f"{row['seconds']:.0f} s, {row['peak_bytes'] / GIB:.1f} GiB"
    return shown + ("" if subject is None else _verdict(row["peak_bytes"] <= subject.most_engine_memory))


def _step_speed(rows: Row, _: Subject | None) -> str:
    if (row := rows.get("step")) is None:
        return _MISSING
    own, plain = row["device"]["seconds_per_step"], row["plain"]["seconds_per_step"]
    shown = f"{own:.2f} s; opened plainly, with pre-packed weights beside the file's, {plain:.2f} s"
    return shown + _verdict(own <= STEP_SPEED * plain)


def _step_memory(rows: Row, _: Subject | None) -> str:
    if (row := rows.get("step")) is None:
        return _MISSING
    share, plain = (row[way]["resident_bytes"] / row["weight_bytes"] for way in ("device", "plain"))
    return f"{share:.2f} × weights; opened plainly {plain:.2f} ×{_verdict(share <= MOST_STEP_SHARE)}"


def _step_opening(rows: Row, _: Subject | None) -> str:
    if (row := rows.get("step")) is None:
        return _MISSING
    first, later, plain = (row[way]["seconds_to_open"] for way in ("first", "device", "plain"))
    return f"{later:.1f} s, the first time {first:.1f} s; plainly {plain:.1f} s"


def _run_row(rows: Row, _: Subject | None) -> str:
    if (row := rows.get("run")) is None:
        return _MISSING
    return f"{row['seconds']:.0f} s, {row['peak_bytes'] / GIB:.2f} GiB"


_ROWS: tuple[tuple[str, Callable[[Row, Subject | None], str]], ...] = (
    ("checkpoint → INT4 ONNX, `hptool export --no-compare`: peak memory, at most 2.5 GiB", _write_memory),
    ("its time, at most 6 × one read and 10 min", _write_time),
    ("`hptool export`, which then compares every graph with torch: time, peak memory", _compared),
    ("INT4 transformer, at most 3.5 and 5.0 GB", _onnx_bytes),
    ("engine for compute capability 8.9, 1024², batch 1: at most 1.1 × ONNX", _engine_size),
    ("its build: time, peak memory, at most 16 and 22 GiB", _engine_build),
    ("a step on onnxruntime, 256²: as with pre-packed weights", _step_speed),
    ("memory after it, at most 1.35 × weights", _step_memory),
    ("opening it", _step_opening),
    ("`hptool run`, one step: time, peak memory", _run_row),
)


def _verdict(met: bool) -> str:
    return "" if met else " **(above what was aimed at)**"


def _machines(found: Row) -> list[str]:
    rows = [row for rows in found["rows"].values() for row in rows.values()]
    rows += [found["ordinary"]] if found["ordinary"] else []
    lines = []
    for row in rows:
        own = dict(row["machine"])
        processor, cores, size = own.pop("processor"), own.pop("cores"), own.pop("memory_bytes")
        versions = ", ".join(f"{name} {value}" for name, value in own.items() if value)
        lines.append(f"{processor}, {cores} cores, {size / GIB:.0f} GiB; {versions}")
    return list(dict.fromkeys(lines))


def _ordinary_lines(row: Row | None) -> list[str]:
    lines = [
        "## The ordinary way",
        "",
        *_ORDINARY_INTRODUCTION.splitlines(),
        "",
    ]
    if row is None:
        return [*lines, "Not measured."]
    lines += ["| blocks | outcome | time | peak memory | INT4 transformer |", "|---|---|---|---|---|"]
    for attempt in row["attempts"]:
        lines.append(_ordinary_row(str(attempt["blocks"]), attempt["stopped"] or "survived", attempt))
    if row["hptool"] is not None:
        ratios = row["ratios"]
        lines += [
            _ordinary_row(str(row["blocks"]), "`hptool export`, the whole pipeline", row["hptool"]),
            "",
            f"At {row['blocks']} blocks the ordinary way takes {ratios['peak_bytes']:.1f} times the memory",
            f"and {ratios['seconds']:.1f} times the time.",
        ]
    return lines


def _ordinary_row(blocks: str, outcome: str, row: Row) -> str:
    size = f"{row['transformer_bytes'] / GB:.2f} GB" if "transformer_bytes" in row else "–"
    return f"| {blocks} | {outcome} | {row['seconds']:.0f} s | {row['peak_bytes'] / GIB:.2f} GiB | {size} |"


if __name__ == "__main__":
    app()
