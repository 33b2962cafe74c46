"""A process that is killed leaves nothing that the next one stumbles over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

MakeBundle = Callable[..., Path]

# `hptool run` with graphs prepared, however small, that kills itself where it is told to: when it has called
# a function so often and is about to again.
RUN = """
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
sys.argv = ["hptool", "run", *arguments]
cli.main()
"""


def run(
    bundle: Path, cache: Path, output: Path, *, where: str = "", call: int = 0
) -> subprocess.CompletedProcess[str]:
    arguments = [str(bundle), "a red circle", "--output", str(output), "--target", "cpu-x86"]
    return subprocess.run(
        [sys.executable, "-c", RUN, where, str(call), *arguments],
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
        ("deploy.pipeline.save_png", 0, 3),  # all are that have weights
    ],
)
def test_a_run_that_was_killed_while_preparing_is_followed_by_one_that_works(
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
