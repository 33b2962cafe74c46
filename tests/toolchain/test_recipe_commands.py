"""A recipe speaks for the options that are not given by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests import typed
from toolchain.artifacts import read_json

RECIPE = """
name = "mine"
description = "of a test"
model = "{model}"
rule = "random"
remove = "2-3"
semantics = "identity"
strengths = "pwp"
num_prompts = 2
steps = 2
batch_size = 3
learning_rate = 1e-5
features = 1e-4
checkpointing = true
precision = "float32"
"""

Hptool = Callable[..., int]


@pytest.fixture
def hptool(tmp_path: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hptool:
    """Runs a command beside `mine.toml`."""
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(RECIPE.format(model=tiny_path))
    return partial(typed.hptool, monkeypatch)


def made(hptool: Hptool, *by_hand: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The plan and the recipe in the report of a student."""
    assert hptool("compress", "--recipe", "mine.toml", *by_hand, "--per-task", "0", "-o", "student") == 0
    return read_json(Path("student/plan.json")), read_json(Path("student/report.json"))["recipe"]


def test_a_recipe_is_followed(hptool: Hptool, tiny_path: Path) -> None:
    plan, done = made(hptool)
    assert (plan["model"], plan["removed"], plan["semantics"]) == (str(tiny_path), ["2", "3"], "identity")
    assert plan["asked"]["strengths"] == "pwp"
    assert (done["steps"], done["batch_size"], done["learning_rate"]) == (2, 3, 1e-5)
    assert (done["losses"]["features"], done["checkpointing"]) == (1e-4, True)
    assert done["decision"]["prompts"] == 2


def test_what_is_given_by_hand_wins(hptool: Hptool) -> None:
    plan, done = made(hptool, "--steps", "1", "--semantics", "zero", "--strengths", "none")
    assert (plan["semantics"], plan["asked"]["strengths"]) == ("zero", "none")
    assert (done["steps"], done["batch_size"]) == (1, 3)


def test_a_limit_by_hand_takes_the_place_of_the_recipes_own(hptool: Hptool) -> None:
    plan, _ = made(hptool, "--ratio", "0.1")
    assert (plan["rule"], plan["asked"]["ratio"]) == ("random", 0.1)


def test_removal_by_hand_takes_the_place_of_a_ratio(hptool: Hptool) -> None:
    text = Path("mine.toml").read_text().replace('remove = "2-3"', 'ratio = 0.3\nassumes = "2-3"')
    Path("mine.toml").write_text(text)
    plan, _ = made(hptool, "--remove", "4")
    assert plan["removed"] == ["4"]


def test_a_recipe_that_cannot_be_used_is_one_message(
    hptool: Hptool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hptool("compress", "--recipe", "nosuch") == 2
    assert capsys.readouterr().err.startswith("error: there is no recipe 'nosuch'; there are flux.1-dev, ")


def test_recipes_are_listed_and_shown_with_what_they_take(
    hptool: Hptool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert hptool("recipes") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows if row and row[0].startswith("flux")][:2] == [
        "flux.1-dev",
        "flux.1-dev-paper",
    ]
    assert hptool("recipes", "--json") == 0
    listed = json.loads(capsys.readouterr().out)["recipes"]
    name = "sd3.5-large-turbo-paper-20"
    assert hptool("recipes", "show", name, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown in listed
    assert shown["takes"]["parameters"] == {"before": 8_056_627_520, "after": 6_352_630_080}
    assert hptool("recipes", "show", name) == 0
    text = capsys.readouterr().out
    assert "8,056,627,520 parameters become 6,352,630,080: 21.2% go" in text
    assert "From: SamsungLabs/HierarchicalPrune" in text
    assert "measured on none" in text


def test_two_forms_of_the_list_at_once_are_refused(
    hptool: Hptool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hptool("recipes", "--json", "--markdown") == 2
    assert "choose one" in capsys.readouterr().err
    assert hptool("recipes", "--json", "show", "flux.1-dev") == 2
    assert "come after its name" in capsys.readouterr().err
