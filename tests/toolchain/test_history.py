"""The history of a run is that of the steps the model has behind it, whatever befell it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from toolchain.errors import ToolchainError
from toolchain.history import Check, History, HistoryLog, history_from_json, history_to_json


def check(step: int, error: float) -> Check:
    return Check(step=step, velocity_error=error, score=None, gate=None)


def test_a_history_is_what_was_logged(tmp_path: Path) -> None:
    log = HistoryLog(tmp_path / "work" / "history.jsonl")
    log.step(0, 1.0, 0.1)
    log.step(1, 0.5, 0.2)
    log.check(check(2, 0.3))
    assert log.read(2) == History(losses=(1.0, 0.5), rates=(0.1, 0.2), checks=(check(2, 0.3),))


def test_steps_that_were_taken_again_count_once(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    killed = HistoryLog(path)
    for step in range(4):
        killed.step(step, 9.0, 0.1)
        killed.check(check(step + 1, 9.0))
    resumed = HistoryLog(path)
    for step in (1, 2, 3):
        resumed.step(step, 1.0, 0.1)
        resumed.check(check(step + 1, 1.0))
    found = resumed.read(3)
    assert found.losses == (9.0, 1.0, 1.0)
    assert [item.velocity_error for item in found.checks] == [9.0, 1.0, 1.0]


def test_half_a_line_at_the_end_is_none(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    HistoryLog(path).step(0, 1.0, 0.1)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 1, "lo')
    log = HistoryLog(path)
    assert path.read_bytes() == whole
    log.step(1, 0.5, 0.1)
    assert log.read(2).losses == (1.0, 0.5)


def test_a_history_is_read_as_it_was_written() -> None:
    history = History(losses=(1.0,), rates=(0.1,), checks=(check(1, 0.5),))
    assert history_from_json(json.loads(json.dumps(history_to_json(history)))) == history


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "no history of schema version 1, but of 2"),
        ({"losses": [1.0, 2.0]}, "2 losses and 1 rates"),
        ({"losses": ["1.0"]}, "no number"),
        ({"losses": [float("nan")]}, "no number"),
        ({"checks": [{"step": 1}]}, "damaged"),
        ({"more": []}, "damaged"),
    ],
)
def test_what_is_no_history_is_refused(change: dict[str, Any], message: str) -> None:
    whole = {"schema_version": 1, "losses": [1.0], "rates": [0.1], "checks": []}
    with pytest.raises(ToolchainError, match=message):
        history_from_json(whole | change)
