"""All benchmarks are measured by one command, and what failed is not taken for measured."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import typer

from benchmarks import __main__ as main
from benchmarks.registry import Benchmark


def test_one_that_fails_keeps_no_other_from_being_measured_and_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called, broken = [], {"first"}

    def call(item: Benchmark, command: str) -> None:
        called.append(item.name)
        if item.name in broken:
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(main, "_call", call)
    monkeypatch.setattr(main, "tables", lambda: None)
    monkeypatch.setattr(main, "STATE", tmp_path / "state.json")
    chosen = [Benchmark(name=name, question="", measure=("",), quick=True) for name in ("first", "second")]
    with pytest.raises(typer.Exit) as ended:
        main._measure(chosen, again=False)
    assert ended.value.exit_code == 1
    assert "run again: first" in capsys.readouterr().err
    broken.clear()
    main._measure(chosen, again=False)
    assert called == ["first", "second", "first"]
