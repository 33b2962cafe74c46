"""What the documents tell people to type."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.exceptions import TyperException

from toolchain.cli import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]


def commands(text: str) -> Iterator[str]:
    """Lines of a document's code blocks, indented or fenced, that run hptool."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^ {4}(.*)$", text, re.MULTILINE)
    for line in (*"".join(fenced).splitlines(), *indented):
        if line.startswith("hptool "):
            yield line


def parse(words: list[str]) -> None:
    """Have the command line read some words, and run nothing.

    Raises:
        TyperException: There is no such command or option, or a value does not suit it.
    """
    command: Any = typer.main.get_command(app)
    while words:
        known = getattr(command, "commands", {})
        if words[0] not in known:
            raise TyperException(f"no command {words[0]!r}")
        command = known[words[0]]
        context = command.make_context(words[0], words[1:])
        words = context._protected_args + context.args  # of a command of a command


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_documents_are_ones_there_are(document: Path) -> None:
    for line in commands(document.read_text(encoding="utf-8")):
        words = shlex.split(line, comments=True)[1:]
        try:
            parse(words)
        except TyperException as error:
            pytest.fail(f"{line}: {error}")


@pytest.mark.parametrize("line", ["compress --no-such-option", "targets shew", "export --target", "paint"])
def test_a_command_that_there_is_not_would_be_found(line: str) -> None:
    with pytest.raises(TyperException):
        parse(shlex.split(line))
