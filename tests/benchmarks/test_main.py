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


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        ("toolchain/inner/part.py", {"one", "two"}),
        ("benchmarks/one.py", {"one"}),
        ("benchmarks/imported.py", {"one"}),
        ("benchmarks/also_imported.py", {"one"}),
        ("benchmarks/imported_by_that.py", {"one"}),
        ("benchmarks/run_as_a_command.py", {"two"}),
        ("benchmarks/of_nobody.py", set()),
    ],
)
def test_a_benchmark_is_of_other_code_where_the_tool_or_a_module_it_uses_has_changed(
    changed: str, again: set[str], tmp_path: Path
) -> None:
    sources = {
        "benchmarks/one.py": "from benchmarks import imported, also_imported",
        "benchmarks/two.py": 'run([sys.executable, "-m", "benchmarks.run_as_a_command"])',
        "benchmarks/imported.py": "from benchmarks.imported_by_that import it",
        "benchmarks/also_imported.py": "",
        "benchmarks/imported_by_that.py": "",
        "benchmarks/run_as_a_command.py": "",
        "benchmarks/of_nobody.py": "",
        "toolchain/inner/part.py": "",
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    before = {name: main.digest_of_code(name, tmp_path) for name in ("one", "two")}
    (tmp_path / changed).write_text("changed", encoding="utf-8")
    assert {name for name in before if main.digest_of_code(name, tmp_path) != before[name]} == again
