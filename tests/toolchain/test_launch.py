"""A run in several processes is begun by one command, survives the death of one, and can go on in others."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.typed import hptool
from toolchain.artifacts import read_json
from toolchain.errors import ToolchainError
from toolchain.history import HISTORY_FILE
from toolchain.launch import launch

REPOSITORY = Path(__file__).parents[2]
TWO = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_machines: 1
num_processes: 2
machine_rank: 0
main_process_port: 0
mixed_precision: 'no'
"""
ZERO = TWO.replace("MULTI_GPU", "DEEPSPEED") + "deepspeed_config: {zero_stage: 2}\n"


@contextmanager
def running(directory: Path, module: str, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A command line; what it has started is ended with it."""
    run = subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield run
    finally:
        run.terminate()
        run.communicate(timeout=60)


def children(run: subprocess.Popen[str]) -> list[int]:
    found = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text(encoding="utf-8")
    return list(map(int, found.split()))


def test_a_killed_process_ends_a_run_with_one_error_and_three_machines_end_it_as_one_process_does(
    tiny_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "two.yaml").write_text(ZERO, encoding="utf-8")
    (tmp_path / "prompts.txt").write_text(
        "\n".join(f"{index} squares" for index in range(20)), encoding="utf-8"
    )
    command = (
        *("compress", tiny_path, "--remove=3", "--num-prompts=3", "--prompts=prompts.txt", "--per-task=0"),
        *("--steps=40", "--batch-size=6", "--checkpoint-every=4"),
    )
    saved = tmp_path / "student.work"

    with running(tmp_path, "toolchain", *command, "--output=student", "--accelerate-config=two.yaml") as run:
        while not list(saved.rglob("step-*.safetensors")):
            assert run.poll() is None, run.communicate()
            time.sleep(0.02)
        processes = children(run)
        os.kill(processes[1], signal.SIGKILL)
        _, said = run.communicate(timeout=60)
    assert run.returncode == 2
    [last] = saved.rglob("step-*")
    assert said.count("error") == 1, said
    assert said.count("note: ZeRO 2 is done by PyTorch's FSDP2") == 1, said
    assert said.splitlines()[-1] == (
        "error: process 1 was ended by SIGKILL, as the system does for want of memory, and with it the run. "
        f"{last.relative_to(tmp_path)} is the last state that was saved; once the cause is mended, the same "
        "command goes on from there"
    )
    assert not any(Path(f"/proc/{each}").exists() for each in processes)
    with safe_open(last, framework="pt") as stored:
        assert 0 < int(stored.metadata()["step"]) < 40

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ExitStack() as stack:
        machines = [
            stack.enter_context(
                running(
                    tmp_path,
                    *("accelerate.commands.launch", "--multi_gpu", "--num_machines=3", "--num_processes=3"),
                    *(f"--machine_rank={rank}", "--main_process_ip=127.0.0.1", f"--main_process_port={port}"),
                    *("--module", "toolchain", *command, "--output=student"),
                )
            )
            for rank in range(3)
        ]
        with running(tmp_path, "toolchain", *command, "--output=alone") as alone:
            ends = [(*each.communicate(timeout=200), each.returncode) for each in (*machines, alone)]
    assert [code for _, _, code in ends] == [0, 0, 0, 0], ends
    assert ["Student written" in said for said, _, _ in ends] == [True, False, False, True]
    assert not saved.exists()
    together, one = (read_json(tmp_path / name / HISTORY_FILE)["losses"] for name in ("student", "alone"))
    # Products of bfloat16 come out otherwise in batches of another size; test_processes.py is exact.
    assert together == pytest.approx(one, rel=0.15)


def test_a_configuration_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match=r"there is no accelerate configuration .*two\.yaml"):
        launch(tmp_path / "two.yaml", [], str)
    for text, said in {
        TWO.replace("num_processes", "num_proceses"): "num_proceses",
        TWO.replace(
            "MULTI_GPU", "MEGATRON_LM"
        ): "MEGATRON_LM, and hptool knows NO, MULTI_GPU, FSDP, DEEPSPEED",
        ZERO.replace("zero_stage", "zero_stag"): "zero_stag",
        ZERO.replace("2}", "2, offload_optimizer_device: nvme}"): "offload_optimizer .* to nvme",
    }.items():
        (tmp_path / "two.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(ToolchainError, match=rf"accelerate cannot launch what .* asks for: .*{said}"):
            launch(tmp_path / "two.yaml", [], str)


@pytest.mark.parametrize(
    "command",
    [("analyze", "--pairs"), ("plan", "--ratio=0.2"), ("precompute", "set"), ("compress", "--steps=3")],
)
def test_a_command_is_given_on_to_processes_and_what_they_say_last_is_said(
    command: tuple[str, ...],
    tiny_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [command[0], str(tiny_path), *command[1:], f"--output={tmp_path / 'out'}"]
    launched = []

    def launch(config: Path, arguments: list[str], kept: Callable[[], str]) -> tuple[str, int]:
        launched.append((config, arguments, "command" in kept()))
        return "the one that ended", 75

    monkeypatch.setattr("toolchain.launch.launch", launch)
    assert hptool(monkeypatch, *given[:2], "--accelerate-config", "two.yaml", *given[2:]) == 75
    assert capsys.readouterr().err == "the one that ended\n"
    assert launched == [(Path("two.yaml"), given, True)]
    assert not (tmp_path / "out").exists()
