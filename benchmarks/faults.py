"""What survives when long work is disturbed, and whether it ends as it would have.

    python -m benchmarks.faults measure              # into benchmarks/results/faults.json; 20 minutes
    python -m benchmarks.faults measure compress     # of one command alone
    python -m benchmarks.faults table                # writes docs/faults.md

Each command is disturbed as soon as something of its work is finished, and then given again. Every file it
writes has to be, byte for byte, what an undisturbed run writes.
"""

from __future__ import annotations

import hashlib
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from PIL import Image

from benchmarks.machine import machine
from toolchain.artifacts import read_json, write_json
from toolchain.families.view import built_in_path

app = typer.Typer(add_completion=False, help=__doc__)

RESULTS = Path(__file__).parent / "results" / "faults.json"
PAGE = Path(__file__).parents[1] / "docs" / "faults.md"
LIMIT = 4096
"""Bytes that a file may have from the moment the disk is full."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One that is disturbed, in a directory where `prepare` has put what it needs."""

    words: tuple[str, ...]
    result: str
    """Directory it writes."""
    finished: str
    """Pattern of files that are finished pieces of its work: as soon as there is one, it is disturbed."""
    called: str
    """What such a piece is called."""
    reads: str | None
    """Pattern of the file whose end is cut off for a broken shard."""
    together: bool
    """Whether several processes share it."""
    batches: bool
    """Whether it computes with batches that could hold what is no number."""


_TWO = """compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_machines: 1
num_processes: {workers}
machine_rank: 0
main_process_port: 0
mixed_precision: 'no'
"""
"""accelerate's name for several processes, on processors, too."""
_FEW = ("--num-prompts", "2")
COMMANDS = {
    "analyze": Command(
        words=("analyze", "model", *_FEW, "-o", "out"),
        result="out",
        finished="out/pieces/seed-*.json",
        called="pieces",
        reads="model/transformer/*.safetensors",
        together=True,
        batches=True,
    ),
    "precompute": Command(
        words=("precompute", "model", "pictures", "--batch-size", "4", "-o", "out"),
        result="out",
        finished="out.work/shards/*.safetensors",
        called="shards",
        reads="pictures/00002.tar",
        together=True,
        batches=True,
    ),
    "compress": Command(
        words=(
            *("compress", "model", *_FEW, "--remove", "6-9", "--steps", "12", "--batch-size", "8"),
            *("--checkpoint-every", "2", "--per-task", "0", "-o", "out"),
        ),
        result="out",
        finished="out.work/try-1/checkpoints/*.safetensors",
        called="checkpoint",
        reads="data/*.safetensors",
        together=True,
        batches=True,
    ),
    "export": Command(
        words=("export", "model", "--target", "cpu-x86", "--bits", "8", "-o", "out"),
        result="out",
        finished="cache/components/[!.]*/component.json",
        called="parts",
        reads="model/transformer/*.safetensors",
        together=False,
        batches=False,
    ),
}
FAULTS = ("kill -9", "SIGTERM", "disk full", "broken shard", "NaN batch", "one of two workers killed")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What became of one command under one fault."""

    status: int
    said: str
    """Its last line."""
    survived: int
    """Finished pieces."""
    wrote: bool
    """Whether there was a result in spite of the fault."""
    equal: bool
    """Whether the command, given again, wrote what an undisturbed one writes."""


@app.command()
def measure(
    commands: Annotated[list[str] | None, typer.Argument(help="All unless named.")] = None,
    fault: Annotated[list[str] | None, typer.Option(help="All unless named.")] = None,
    scratch: Annotated[Path | None, typer.Option(help="Where the work is done.")] = None,
) -> None:
    """Disturb commands in every way that makes sense for them."""
    anew = not (commands or fault) or not RESULTS.exists()
    results: dict[str, Any] = {"schema_version": 1, "cells": {}} if anew else read_json(RESULTS)
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        for name in commands or COMMANDS:
            command, whole = COMMANDS[name], dict[int, dict[str, str]]()
            for each in fault or FAULTS:
                if reason(name, each) is not None:
                    continue
                workers = 2 if each == FAULTS[-1] else 1
                if workers not in whole:
                    place = _prepare(Path(directory) / f"{name}-{workers}", name)
                    status, said = _run(command, place, workers=workers)
                    if status:
                        raise SystemExit(f"{name} without any fault: {said}")
                    whole[workers] = contents(place / command.result)
                cell = _disturb(name, each, Path(directory) / f"{name}-disturbed", whole[workers], workers)
                print(f"{name}, {each}: {cell}", flush=True)
                results["cells"].setdefault(name, {})[each] = asdict(cell)
                results["machine"] = machine()
                write_json(RESULTS, results)


@app.command()
def table() -> None:
    """Write docs/faults.md."""
    PAGE.write_text(page(read_json(RESULTS)), encoding="utf-8")


@app.command(hidden=True, context_settings={"ignore_unknown_options": True})
def poisoned(finished: str, words: Annotated[list[str], typer.Argument()]) -> None:
    """Run a command whose first batch after something is finished holds what is no number."""
    from diffusers import AutoencoderKL

    from toolchain import cli
    from toolchain.families.sd3 import SD3

    begin, encode, done = SD3.begin, AutoencoderKL.encode, list[bool]()

    def spoil(tensor: Any) -> Any:
        if done or not any(Path().glob(finished)):
            return tensor
        done.append(True)
        return tensor * float("nan")

    SD3.begin = lambda self, latents, *rest: begin(self, spoil(latents), *rest)  # type: ignore[method-assign]
    AutoencoderKL.encode = lambda self, pictures, **options: encode(self, spoil(pictures), **options)
    sys.argv = ["hptool", *words]
    cli.main()


def reason(command: str, fault: str) -> str | None:
    """Why a cell makes no sense; None if it does."""
    if fault == FAULTS[-1] and not COMMANDS[command].together:
        return "one process does it"
    if fault == "NaN batch" and not COMMANDS[command].batches:
        return "no data goes in"
    return None


def contents(directory: Path) -> dict[str, str]:
    """Digests of all files by their names."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def _disturb(name: str, fault: str, place: Path, whole: dict[str, str], workers: int) -> Cell:
    command = COMMANDS[name]
    shutil.rmtree(place, ignore_errors=True)
    _prepare(place, name, data=fault == "broken shard")
    result = place / command.result
    if fault == "broken shard":
        assert command.reads is not None
        shard = max(place.glob(command.reads))
        intact = shard.read_bytes()
        shard.write_bytes(intact[: len(intact) // 2])
        status, said = _run(command, place)
        wrote, survived = _is_written(name, result), len(list(place.glob(command.finished)))
        shard.write_bytes(intact)
        shutil.rmtree(result, ignore_errors=True)
        if name == "compress":  # trained on other data than all the others
            shutil.copytree(place, other := place.with_name("undisturbed"), dirs_exist_ok=True)
            _run(command, other)
            whole = contents(other / command.result)
            shutil.rmtree(other)
    else:
        status, said = _run(command, place, fault=fault, workers=workers)
        wrote, survived = _is_written(name, result), len(list(place.glob(command.finished)))
    if wrote and fault != "broken shard":
        again, error = 0, ""
    else:
        again, error = _run(command, place, workers=workers)
    if again:
        print(error)
    equal = again == 0 and contents(result) == whole
    return Cell(status=status, said=said, survived=survived, wrote=wrote, equal=equal)


def _is_written(name: str, result: Path) -> bool:
    # An analysis keeps its pieces where its result will be.
    return (result / "sensitivity.json").exists() if name == "analyze" else result.exists()


def _run(command: Command, place: Path, *, fault: str | None = None, workers: int = 1) -> tuple[int, str]:
    """Run a command, disturb it when something of it is finished, and say how it ended."""
    words = list(command.words)
    if command.reads == "data/*.safetensors" and (place / "data").exists():
        words += ["--data", "data"]
    program = ["-m", "toolchain"]
    if fault == "NaN batch":
        program = ["-m", "benchmarks.faults", "poisoned", command.finished, "--"]
    if workers > 1:
        (place / "two.yaml").write_text(_TWO.format(workers=workers), encoding="utf-8")
        words += ["--accelerate-config", "two.yaml"]
    environment = os.environ | {
        "HPTOOL_CACHE": str(place / "cache"),
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    with (place / "errors").open("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *program, *words],
            cwd=place,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
        if fault in _DISTURBANCES:
            while process.poll() is None and not any(place.glob(command.finished)):
                time.sleep(0.002)
            if process.poll() is None:
                _DISTURBANCES[fault](process)
        status = process.wait()
        errors.seek(0)
        lines = [line.strip() for line in errors.read().splitlines() if line.strip(" =-")]
    return status, (lines or [""])[-1].replace(str(place), "")


def _fill_disk(process: subprocess.Popen[bytes]) -> None:
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (LIMIT, LIMIT))


def _kill_worker(process: subprocess.Popen[bytes]) -> None:
    workers = psutil.Process(process.pid).children(recursive=True)
    next(item for item in workers if item.environ().get("LOCAL_RANK") == "1").kill()


_DISTURBANCES: dict[str | None, Callable[[subprocess.Popen[bytes]], None]] = {
    "kill -9": lambda process: process.kill(),
    "SIGTERM": lambda process: process.send_signal(signal.SIGTERM),
    "disk full": _fill_disk,
    "one of two workers killed": _kill_worker,
}


def _prepare(place: Path, name: str, *, data: bool = False) -> Path:
    """A directory with a model and, for those that read any, data."""
    place.mkdir(parents=True)
    shutil.copytree(built_in_path(), place / "model")
    if name == "precompute" or (name == "compress" and data):
        (place / "pictures").mkdir()
        for index in range(3):
            with tarfile.open(place / "pictures" / f"{index:05}.tar", "w") as tar:
                for key, content in _samples(index):
                    member = tarfile.TarInfo(key)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    if name == "compress" and data:
        words = ("precompute", "model", "pictures", "-o", "data")
        subprocess.run([sys.executable, "-m", "toolchain", *words], cwd=place, check=True)
    return place


def _samples(index: int) -> Iterator[tuple[str, bytes]]:
    colors = np.random.default_rng(index).integers(0, 256, (64, 3))  # more than one shard of all three
    for number, color in enumerate(colors):
        stream = io.BytesIO()
        Image.new("RGB", (64, 64), tuple(map(int, color))).save(stream, "png")
        yield f"{number:05}.png", stream.getvalue()
        yield f"{number:05}.txt", f"picture {number} of {index}".encode()


_INTRODUCTION = """# When long work is disturbed

Made by `python -m benchmarks.faults table` of what `python -m benchmarks.faults measure` saw with the
`shapes` model on {processor}, {cores} cores.
Each command was disturbed as soon as something of its work was finished, and then given again. *Equal* means
that it then wrote, byte for byte, what an undisturbed run writes.

A full disk is one that takes no file of more than {limit} bytes from that moment on. A broken shard is a file
cut in half before the command begins, and mended before it is given again: weights of the model for `analyze`
and `export`, a tar of pictures for `precompute`, precomputed data for `compress`. The NaN batch is the next
one that goes into the transformer or the VAE.
"""


def page(results: dict[str, Any]) -> str:
    """The text of docs/faults.md."""
    on = results["machine"]
    lines = [
        _INTRODUCTION.format(processor=on["processor"], cores=on["cores"], limit=LIMIT),
        "| | " + " | ".join(f"`{name}`" for name in COMMANDS) + " |",
        "|---" * (1 + len(COMMANDS)) + "|",
    ]
    for fault in FAULTS:
        cells = [_text(name, fault, results["cells"].get(name, {}).get(fault)) for name in COMMANDS]
        lines.append(f"| {fault} | " + " | ".join(cells) + " |")
    lines += ["", "## What they said", ""]
    for name, cells in results["cells"].items():
        lines += [f"- `{name}`, {fault}: `{cell['said'] or '(nothing)'}`" for fault, cell in cells.items()]
    return "\n".join(lines) + "\n"


def _text(name: str, fault: str, found: dict[str, Any] | None) -> str:
    if (why := reason(name, fault)) is not None:
        return f"– ({why})"
    if found is None:
        return "not run yet"
    cell = Cell(**found)
    ended = f"exit code {cell.status}" if cell.status >= 0 else signal.Signals(-cell.status).name
    kept = f"{cell.survived} {COMMANDS[name].called}" if cell.survived else "nothing to keep"
    if cell.wrote:
        kept = "the rest is written"
    return f"{ended}; {kept}; {'equal' if cell.equal else '**not equal**'}"


if __name__ == "__main__":
    app()
