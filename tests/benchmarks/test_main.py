"""All benchmarks are measured by one command, and what failed, or was stopped, is not taken for measured."""

from __future__ import annotations

import importlib
import subprocess
from pathlib import Path

import pytest
import typer.main

from benchmarks import __main__ as main
from benchmarks.registry import BENCHMARKS, Benchmark


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
    chosen = [Benchmark(name=name, question="", measure="", quick=True) for name in ("first", "second")]
    with pytest.raises(typer.Exit) as ended:
        main._measure(chosen, again=False)
    assert ended.value.exit_code == 1
    assert "run again: first" in capsys.readouterr().err
    broken.clear()
    main._measure(chosen, again=False)
    assert called == ["first", "second", "first"]


def test_what_is_half_measured_touches_no_result_and_is_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, failing = tmp_path / "results", [True]
    (results / "cells").mkdir(parents=True)
    (results / "cells" / "old").touch()

    def call(item: Benchmark, command: str, option: str, place: str) -> None:
        assert (command, option) == ("run", "--into")
        number = len(list(Path(place).glob("*")))
        Path(place).mkdir(exist_ok=True)
        (Path(place) / str(number)).touch()
        if failing:
            raise subprocess.CalledProcessError(1, command)

    def there() -> list[str]:
        return sorted(path.name for path in (results / "cells").iterdir())

    for name, value in {
        "_call": call,
        "tables": lambda: None,
        "RESULTS": results,
        "STATE": tmp_path / "state.json",
        "UNFINISHED": tmp_path / "unfinished",
    }.items():
        monkeypatch.setattr(main, name, value)
    chosen = [Benchmark(name="one", question="", measure="run", quick=True, resumes_from=("--into", "cells"))]
    with pytest.raises(typer.Exit):
        main._measure(chosen, again=False)
    assert there() == ["old"]
    failing.clear()
    main._measure(chosen, again=False)
    assert there() == ["0", "1"]
    main._measure(chosen, again=True)
    assert there() == ["0"]


@pytest.mark.parametrize(
    "item", [item for item in BENCHMARKS if item.resumes_from], ids=lambda item: item.name
)
def test_where_one_goes_on_from_is_an_option_of_its_command(item: Benchmark) -> None:
    assert item.resumes_from is not None
    program = typer.main.get_group(importlib.import_module(f"benchmarks.{item.name}").app)
    known = [name for option in program.commands[item.measure].params for name in option.opts]
    assert item.resumes_from[0] in known


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
