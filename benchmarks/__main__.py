"""Measure everything, and write every table in docs/ from what was measured.

    python -m benchmarks quick      # what half an hour on two cores allows: `make bench`
    python -m benchmarks full       # all of it, five hours there and 60 GB of disk: `make bench-full`
    python -m benchmarks tables     # the pages alone, from results/*.json

What has been measured with the code as it is, the tool's and the benchmark's own, is not measured again, so a
run that was stopped goes on when the same command is given; `--again` measures all anew. What is half
measured lies in build/bench, and takes the place of the results there are when it is whole. One that fails
keeps no other from being measured, and is said at the end. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.machine import machine
from benchmarks.registry import BENCHMARKS, RESULTS, Benchmark
from toolchain.artifacts import read_json, write_json

app = typer.Typer(add_completion=False, help=__doc__)

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
STATE = ROOT / "build" / "bench.json"
"""What has been measured with which code; not kept beyond this machine."""
UNFINISHED = ROOT / "build" / "bench"

Again = Annotated[bool, typer.Option("--again", help="Measure also what has been measured already.")]


@app.command()
def quick(again: Again = False) -> None:
    """Measure what half an hour allows."""
    _measure([item for item in BENCHMARKS if item.quick], again=again)


@app.command()
def full(again: Again = False) -> None:
    """Measure everything."""
    _measure(list(BENCHMARKS), again=again)


@app.command()
def tables() -> None:
    """Write every page from the results there are."""
    for item in BENCHMARKS:
        if item.table is not None and item.results.exists():
            _call(item, item.table)
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The text of docs/benchmarks.md."""
    lines = [
        "# Benchmarks",
        "",
        "Made by `python -m benchmarks tables` of what the commands below measured; nothing is typed",
        "by hand. `make bench` measures what half an hour on two cores allows, `make bench-full` everything,",
        "and either goes on where it was stopped.",
        "",
        "| question | command | answer | part of `make bench` |",
        "| --- | --- | --- | --- |",
    ]
    for item in BENCHMARKS:
        command = f"python -m benchmarks.{item.name} {item.measure}".rstrip()
        answer = f"[{item.page}]({item.page})" if item.page else f"[below](#{item.name.replace('_', '-')})"
        known = answer if item.results.exists() else "not measured yet"
        lines.append(f"| {item.question} | `{command}` | {known} | {'yes' if item.quick else 'no'} |")
    for item in BENCHMARKS:
        if item.section is not None and item.results.exists():
            results = read_json(item.results)
            on = results["machine"]
            threads = f", {on['threads']} threads" if "threads" in on else ""
            lines += ["", f"## {item.name.replace('_', '-')}", "", item.question, ""]
            lines += [f"{on['processor']}, {on['cores']} cores{threads}, torch {on['torch']}.", ""]
            lines += item.section(results)
    return "\n".join(lines) + "\n"


def _measure(chosen: list[Benchmark], *, again: bool) -> None:
    state: dict[str, Any] = read_json(STATE) if STATE.exists() else {}
    STATE.parent.mkdir(exist_ok=True)
    for item in chosen:
        known, code = state.get(item.name, {}), digest_of_code(item.name)
        if known.get("code") == code and known.get("finished") and not again:
            print(f"{item.name}: measured already, in {known['seconds']:.0f} s", flush=True)
            continue
        if known.get("code") != code or known.get("finished"):  # anew, and not on from where it was stopped
            if item.resumes_from is not None:
                _remove(UNFINISHED / item.resumes_from[1])
            state[item.name] = {"code": code, "finished": False, "seconds": 0.0}
            write_json(STATE, state)
        started = time.perf_counter()
        try:
            _run(item)
            state[item.name]["finished"] = True
        except subprocess.CalledProcessError as failure:
            print(f"{item.name}: {failure}", file=sys.stderr, flush=True)
        finally:
            state[item.name]["seconds"] += time.perf_counter() - started
            write_json(STATE, state)
    tables()
    _show(chosen, state)
    if failed := [item.name for item in chosen if not state[item.name]["finished"]]:
        print(f"failed, and measured when this is run again: {', '.join(failed)}", file=sys.stderr)
        raise typer.Exit(1)


def _run(item: Benchmark) -> None:
    if item.resumes_from is None:
        _call(item, item.measure)
        return
    option, name = item.resumes_from
    UNFINISHED.mkdir(parents=True, exist_ok=True)
    _call(item, item.measure, option, str(UNFINISHED / name))
    _remove(RESULTS / name)
    shutil.move(UNFINISHED / name, RESULTS / name)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _show(chosen: list[Benchmark], state: dict[str, Any]) -> None:
    on = machine()
    print(f"\n{on['processor']}, {on['cores']} cores")
    for item in chosen:
        print(f"{item.name:16} {state[item.name]['seconds']:8.0f} s   docs/{item.page or PAGE.name}")


def _call(item: Benchmark, command: str, *options: str) -> None:
    words = [sys.executable, "-m", f"benchmarks.{item.name}", *command.split(), *options]
    print("+", " ".join(words[1:]), flush=True)
    subprocess.run(words, cwd=ROOT, check=True)


def digest_of_code(name: str, root: Path = ROOT) -> str:
    """Of the tool and of one benchmark: of every module of benchmarks that one of its own names.

    They run each other as commands, too, so that to name one, in whatever way, is to depend on it.
    """
    packages = ("toolchain", "export", "deploy", "profiles")
    paths = {path for package in packages for path in (root / package).rglob("*.py")}
    waiting = [root / "benchmarks" / f"{name}.py"]
    while waiting:
        path = waiting.pop()
        if path not in paths and path.is_file():
            paths.add(path)
            text = path.read_text(encoding="utf-8")
            for named in re.findall(r"benchmarks(?:[./]| import )([\w, ]+)", text):
                waiting += [path.with_name(f"{word}.py") for word in re.findall(r"\w+", named)]
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(path.read_bytes())
    return total.hexdigest()


if __name__ == "__main__":
    app()
