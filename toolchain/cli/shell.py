"""What all commands share: the application, options that mean the same everywhere, how results are shown."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deploy.errors import DeployError
from export.errors import ExportError
from profiles.schema import ProfileError
from toolchain.errors import ToolchainError

app = typer.Typer(
    help="Make a text-to-image diffusion transformer small enough for your device, and run it there.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Console(stderr=True)
# What a missing import means to a user: the extra that brings it.
_EXTRA_OF = {
    **dict.fromkeys(
        ("torch", "diffusers", "transformers", "accelerate", "safetensors", "scipy", "matplotlib"), "compress"
    ),
    **dict.fromkeys(("onnx", "onnxscript", "onnx_ir", "nncf", "polygraphy", "jinja2"), "export"),
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


def emit(data: dict[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    if as_json:
        sys.stdout.write(json.dumps(data, indent=2, default=str) + "\n")
    else:
        show()


@contextmanager
def bars() -> Iterator[Callable[[str, int], Callable[..., None]]]:
    """Progress bars on standard error: yields a function that adds one and returns how to advance it."""
    columns = (
        TextColumn("{task.description:<28}"),
        *(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=True)),
        TextColumn("{task.fields[note]}"),
    )
    progress = Progress(*columns, console=console)

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


def name_of(model: str) -> str:
    return Path(model).resolve().name


_MEMORY = Path(".hptool.json")


def remember(*, student: Path) -> None:
    from toolchain.artifacts import write_json

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
