"""A process that is killed leaves nothing that the next one stumbles over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MakeBundle = Callable[..., Path]

# `hptool` with graphs prepared, however small, that kills itself where it is told to: when it has called
# a function so often and is about to again.
HPTOOL = """
import importlib, os, signal, sys
from deploy import prepared, session
from toolchain import cli

session.MINIMUM_BYTES = 0
where, call, *arguments = sys.argv[1:]
left = int(call)
if where:
    module, _, name = where.rpartition(".")
    holder = importlib.import_module(module)
    function = getattr(holder, name)

    def counted(*given, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*given, **options)

    setattr(holder, name, counted)
sys.argv = ["hptool", *arguments]
cli.main()
"""


def run(bundle: Path, cache: Path, output: Path, **kill: Any) -> subprocess.CompletedProcess[str]:
    return hptool("run", str(bundle), "a red circle", "--output", str(output), cache=cache, **kill)


def hptool(*arguments: str, cache: Path, where: str = "", call: int = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HPTOOL, where, str(call), *arguments, "--target", "cpu-x86"],
        env=os.environ | {"HPTOOL_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("where", "call", "entries"),
    [
        ("deploy.session._rewrite", 1, 0),  # the first graph is half prepared
        ("os.fsync", 0, 0),  # it is written, and has no name yet
        ("os.fsync", 3, 1),  # the second one is
        ("deploy.pipeline.euler_step", 2, 2),  # it paints; the decoder comes last
        ("deploy.pipeline.save_png", 0, 3),  # all are that have weights
    ],
)
def test_a_run_that_was_killed_is_followed_by_one_that_works(
    make_bundle: MakeBundle, tmp_path: Path, where: str, call: int, entries: int
) -> None:
    bundle, cache, output = make_bundle(), tmp_path / "cache", tmp_path / "out.png"
    killed = run(bundle, cache, output, where=where, call=call)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not output.exists()
    named = [path for path in (cache / "prepared").iterdir() if not path.name.startswith(".")]
    assert len(named) == entries
    again = run(bundle, cache, output)
    assert again.returncode == 0, again.stderr
    first = output.read_bytes()
    assert len([path for path in (cache / "prepared").iterdir() if not path.name.startswith(".")]) == 3
    assert run(bundle, cache, output).returncode == 0
    assert output.read_bytes() == first


def test_a_bench_that_was_killed_is_followed_by_one_that_works(
    make_bundle: MakeBundle, tmp_path: Path
) -> None:
    bench = ("bench", str(make_bundle()), "--repeats", "1", "--json")
    killed = hptool(*bench, cache=tmp_path, where="deploy.pipeline.euler_step", call=6)
    assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, ""), killed.stderr
    again = hptool(*bench, cache=tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["repeats"] == 1
