"""Several processes find and teach what one does, and what one of them refuses all refuse."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.toolchain.data.conftest import folder, picture
from toolchain.artifacts import read_json
from toolchain.errors import ToolchainError
from toolchain.processes import processes, use_device

SEVERAL = Path(__file__).parent / "several.py"
REPOSITORY = Path(__file__).parents[2]


@contextmanager
def launched(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A command line of accelerate's launcher, on this machine's processor."""
    run = subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield run
    finally:
        run.terminate()  # and the launcher its processes
        run.communicate(timeout=60)


Findings = tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("several")


@pytest.fixture(scope="module")
def findings(tiny_path: Path, tiny_flux_path: Path, directory: Path) -> Findings:
    """Of one process, and of each of two."""
    several: dict[str, Any] = runpy.run_path(str(SEVERAL))
    files = {f"{color}.png": picture(color) for color in ("red", "green", "blue", "black", "pink")}
    folder(directory / "source" / "pictures", files, {name: f"a {name}" for name in files})
    (directory / "source" / "prompts.txt").write_text("\n".join(several["PROMPTS"]), encoding="utf-8")
    several["precomputed"](tiny_path, directory / "source", directory)
    for way in ("alone", "replicated", "sharded"):
        several["begin"](tiny_path, directory / way / "begun")
    script = (SEVERAL, tiny_path, tiny_flux_path, directory)
    with launched("--num_processes=2", "--main_process_port=0", *script) as run:
        alone = several["measured"](tiny_path)
        alone |= several["students"](tiny_path, tiny_flux_path, directory / "alone")
        told, _ = run.communicate(timeout=300)
    assert run.returncode == 0, told
    return alone, [load_file(directory / f"found-{rank}.safetensors") for rank in range(2)]


def test_an_analysis_of_several_finds_what_one_finds(findings: Findings) -> None:
    alone, together = findings
    for name in ("sampled", "harms", "similarity", "rescored", "errors", "score"):
        for found in together:
            assert torch.equal(found[name], alone[name]), name


def test_several_precompute_what_one_does(findings: Findings, directory: Path) -> None:
    for kind, shards in {"pictures": 3 + 3 + 1, "prompts": 3 + 3}.items():
        alone, together = (
            {path.name: path.read_bytes() for path in (place / kind).iterdir()}
            for place in (directory, directory / "together")
        )
        assert together == alone
        assert len(alone) == shards + 1


def test_several_teach_the_student_that_one_teaches(findings: Findings) -> None:
    alone, together = findings
    ways = {name: name.partition("/")[2] for name in together[0] if "/" in name}
    assert len(ways) == 18
    for name, own in ways.items():
        assert torch.equal(together[0][name], together[1][name]), name
        off = together[0][name] - alone[own]
        if own == "16 bits":  # products come out otherwise in batches of another size
            assert off.norm() < 0.02, name
        else:
            assert off.abs().max() < 1e-5, name


@pytest.mark.parametrize("way", ["replicated", "sharded"])
def test_several_that_were_stopped_end_as_if_they_had_not_been(findings: Findings, way: str) -> None:
    _, (found, _) = findings
    assert torch.equal(found[f"{way}/resumed"], found[f"{way}/nothing"])


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ToolchainError, match="the device 'cuda:7' cannot be used"):
        use_device("cuda:7")


def test_products_of_another_precision_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    processes.cache_clear()
    with pytest.raises(ToolchainError, match="asks for mixed_precision fp16; products are bfloat16 here"):
        processes()


def test_what_one_refuses_all_refuse(findings: Findings, directory: Path) -> None:
    said, other = (read_json(directory / f"refusals-{rank}.json") for rank in range(2))
    assert said == other
    assert said.pop("item") == "process 1 refuses"
    assert said.pop("first") == "process 0 refuses"
    for name, part in {
        "damaged": "the loss became nan at step 0",
        "batch": "a batch of 6 states does not fall into 4 equal shares (2 processes, each in 2 parts)",
        "normalised": "normalised features are divided by their size in the batch",
        "sharded": "weights that are sharded (FSDP) do not rest",
        "version": "accelerate's configuration asks for FSDP 1; set fsdp_version: 2",
    }.items():
        assert part in said.pop(name)
    assert not said
