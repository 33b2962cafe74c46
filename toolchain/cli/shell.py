"""What all commands share: the application, options that mean the same everywhere, how results are shown."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from deploy.errors import DeployError
from export.errors import ExportError
from profiles.schema import ProfileError
from toolchain.artifacts import is_full
from toolchain.errors import ToolchainError
from toolchain.interrupts import Stopped, stoppable
from toolchain.launch import LOST_OTHERS, leave_last_words
from toolchain.processes import Processes, lost_others, processes
from toolchain.progress import Bar

app = typer.Typer(
    help="Make a text-to-image diffusion transformer small enough for your device, and run it there.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Console(stderr=True)
_SAY_EVERY = 60.0
"""Seconds."""
GATE_EXIT, STOPPED_EXIT = 3, 75
"""Of a student that was written but is not worth what was asked for, and of work that a signal ended. 75 is
what other programs mean by it as well: give the same command again."""
# What a missing import means to a user: the extra that brings it.
_EXTRA_OF = {
    **dict.fromkeys(
        ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "scipy", "matplotlib"),
        "compress",
    ),
    **dict.fromkeys(("datasets", "pyarrow"), "data"),
    **dict.fromkeys(
        ("onnx", "onnxscript", "onnx_ir", "nncf", "numba", "blake3", "polygraphy", "jinja2"), "export"
    ),
    **dict.fromkeys(("onnxruntime", "tokenizers", "PIL", "numpy"), "edge"),
    **dict.fromkeys(("fastapi", "uvicorn", "prometheus_client"), "serve"),
    "tensorrt_rtx": "rtx",
}
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Seed = Annotated[int, typer.Option(help="Of everything random.", min=0)]
Source = Annotated[
    str, typer.Argument(help="`shapes`, a directory of a diffusers pipeline, or a hub id owner/name.")
]
Prompts = Annotated[
    Path | None, typer.Option(help="Text file with a prompt a line; needed for any model but `shapes`.")
]
NumPrompts = Annotated[int, typer.Option(help="Prompts to measure harm on.", min=1)]
Device = Annotated[str | None, typer.Option(help="To compute on: cpu, cuda:1, ...; a GPU if there is one.")]
WeightsIn = Annotated[
    Literal["float32", "stored"],
    typer.Option(
        "--precision", help="What the model is held in: `stored` takes half the memory for 16-bit weights."
    ),
]
Remove = Annotated[
    str | None,
    typer.Option(
        help="In place of a rule and a limit: what goes, as 25-28,31-34,13.ff; ranges are inclusive."
    ),
]
WithoutT5 = Annotated[
    Literal["t5"] | None,
    typer.Option("--without", help="Leave out the T5 text encoder of Stable Diffusion 3."),
]


def main() -> None:
    """Run the command line; the user's errors end in one message and exit code 2, a signal in 75."""
    # What these libraries advise is meant for who calls them, and of no use to who types a command.
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    here = Processes()
    try:
        here = processes()
        console.quiet = not here.is_first
        if here.zero is not None:
            console.print(f"note: {here.zero}", soft_wrap=True)
        app()
    except (ToolchainError, ExportError, DeployError, ProfileError) as error:
        fail(str(error))
    except Stopped as stopped:
        fail(f"stopped by {stopped}; what was finished is kept, and the same command goes on", STOPPED_EXIT)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA_OF:
            raise
        extra = _EXTRA_OF[package]
        fail(f"this command needs {package}, which is not installed: pip install 'hptool[{extra}]'")
    except Exception as error:
        if here.number > 1 and lost_others(error):
            sys.exit(LOST_OTHERS)
        if not is_full(error):
            raise
        fail(f"the disk is full ({error}); make room, and give the same command again")


def print_(what: Any) -> None:
    """Show a person something on standard output."""
    if not processes().is_first:
        return
    # Text is not cut at the width of the terminal: a path has to stay whole to be copied.
    Console(highlight=False).print(what, soft_wrap=isinstance(what, str))


def fail(message: str, code: int = 2) -> None:
    # By what the launcher said, for a process may be refused before it knows the others.
    rank = os.environ.get("RANK", "0") if "LOCAL_RANK" in os.environ else "0"
    if not leave_last_words(message) and rank == "0":
        sys.stderr.write(f"error: {message}\n" if code == 2 else f"{message}\n")
    sys.exit(code)


def emit(data: dict[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    if as_json and processes().is_first:
        sys.stdout.write(json.dumps(data, indent=2, default=str) + "\n")
    elif not as_json:
        show()


class _Throughput(ProgressColumn):
    """What a bar does a second, where its steps are all alike."""

    def render(self, task: Task) -> Text:
        unit, each = task.fields["unit"], task.fields["each"]
        speed = task.finished_speed or task.speed
        return Text(f"{each * speed:.3g} {unit}/s" if unit and speed else "")


@contextmanager
def bars() -> Iterator[Bar]:
    """Progress bars on standard error: yields what starts them. Long work under them can be stopped.

    Where nobody looks, on what is no terminal, a line a minute says how far it is.
    """
    columns = (
        TextColumn("{task.description:<28}"),
        *(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=True)),
        *(_Throughput(), TextColumn("{task.fields[note]}")),
    )
    progress = Progress(*columns, console=console)
    said = time.monotonic()

    def add(description: str, total: int | None, /, *, unit: str = "", each: int = 1) -> Callable[..., None]:
        progress.start()  # not before there is a bar: even an empty display prints a line
        number = progress.add_task(description, total=total, note="", unit=unit, each=each)
        task = progress.tasks[-1]

        def advance(*_: object, note: str = "", done: int | None = None) -> None:
            nonlocal said
            if done is not None and done > task.completed + 1:
                # Begun again from there, or what was done before would count as done just now.
                progress.reset(number, completed=done - 1)
            progress.update(number, advance=1, note=note)
            if not console.is_terminal and time.monotonic() - said > _SAY_EVERY:
                said = time.monotonic()
                console.print(description, *(column.render(task) for column in columns[2:]))

        return advance

    try:
        with stoppable():
            yield add
    finally:
        if progress.tasks:
            progress.stop()


def name_of(model: str) -> str:
    return Path(model).resolve().name


_MEMORY = Path(".hptool.json")


def remember(*, student: Path) -> None:
    from toolchain.artifacts import write_json

    if not processes().is_first:
        return
    try:
        write_json(_MEMORY, {"schema_version": 1, "student": str(student)})
    except OSError as error:
        console.print(
            f"note: {_MEMORY} cannot be written here ({error.strerror}); name {student} to export it"
        )


def remembered_student() -> str:
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
