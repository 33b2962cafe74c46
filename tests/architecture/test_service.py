"""What starts the server on a box names commands and options that there are."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from toolchain.cli import app

PACKAGING = Path(__file__).parents[2] / "packaging"


def unit() -> dict[str, str]:
    """The [Service] section, of keys that are there once."""
    parser = configparser.ConfigParser(strict=True, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string((PACKAGING / "hptool.service").read_text())
    assert parser.sections() == ["Unit", "Service", "Install"]
    return dict(parser["Service"])


def started() -> list[list[str]]:
    container = (PACKAGING / "Containerfile").read_text()
    entry = re.search(r"^ENTRYPOINT (\[.*\])$", container, re.MULTILINE)
    assert entry is not None
    return [shlex.split(unit()["ExecStart"]), json.loads(entry[1])]


@pytest.mark.parametrize("index", [0, 1], ids=["systemd", "container"])
def test_the_command_and_its_options_exist(index: int) -> None:
    program, command, *arguments = started()[index]
    assert Path(program).name == "hptool"
    group: Any = typer.main.get_command(app)
    parsed = group.commands[command].make_context(command, arguments)
    assert str(parsed.params["bundle"]).startswith("/")


def test_the_service_stops_no_sooner_than_its_grace() -> None:
    words = shlex.split(unit()["ExecStart"])
    assert int(unit()["TimeoutStopSec"]) > int(words[words.index("--grace") + 1])


def test_the_service_has_no_rights_it_does_not_need() -> None:
    found = unit()
    wanted = {"DynamicUser": "yes", "NoNewPrivileges": "yes", "ProtectSystem": "strict", "ProtectHome": "yes"}
    assert {key: found.get(key) for key in wanted} == wanted
    assert found["CapabilityBoundingSet"] == ""
    assert "MemoryMax" in found


def test_the_container_does_not_run_as_root_and_tells_its_health() -> None:
    text = (PACKAGING / "Containerfile").read_text()
    assert text.index("USER hptool") < text.index("ENTRYPOINT")
    assert "/healthz" in text
