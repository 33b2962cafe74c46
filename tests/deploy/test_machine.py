from __future__ import annotations

import builtins
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from deploy.machine import missing_requirements, read_machine

ROOT = Path(__file__).parents[2]

XEON = "processor\t: 0\nmodel name\t: Intel(R) Xeon(R)\nflags\t\t: fpu avx2 avx512f amx_int8\n"
PI = "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU implementer\t: 0x41\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "processor", "instructions"),
    [
        ({"proc/cpuinfo": XEON}, "Intel(R) Xeon(R)", ("AVX2", "AVX512", "AMX")),
        (
            {"proc/cpuinfo": PI, "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.1\0"},
            "Raspberry Pi 5 Model B Rev 1.1",
            ("NEON", "NEON dotprod"),
        ),
    ],
)
def test_processor_and_what_it_is_fast_with(
    tmp_path: Path, files: dict[str, str], processor: str, instructions: tuple[str, ...]
) -> None:
    machine = read_machine(write(tmp_path, files))
    assert (machine.processor, machine.instructions) == (processor, instructions)


def test_a_system_that_does_not_say_is_no_error(tmp_path: Path) -> None:
    machine = read_machine(tmp_path)
    assert (machine.instructions, machine.memory_bytes, machine.available_bytes) == (None, None, None)


def test_disk_is_that_of_the_cache_even_before_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPTOOL_CACHE", str(tmp_path / "not" / "yet"))
    machine = read_machine()
    assert machine.cache == str(tmp_path / "not" / "yet")
    assert machine.disk_bytes > 0


def test_packages_are_those_that_are_installed() -> None:
    machine = read_machine()
    assert machine.packages["onnxruntime"] == importlib.metadata.version("onnxruntime")
    assert "CPUExecutionProvider" in machine.providers
    assert machine.missing["edge"] == ()


def test_looking_does_not_import_what_is_slow() -> None:
    code = (
        "import sys; from deploy.machine import read_machine; found = read_machine()\n"
        "assert 'torch' in found.packages\n"
        "print(sorted({'torch', 'diffusers', 'onnx', 'nncf', 'polygraphy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_an_onnxruntime_that_is_broken_is_a_fact_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def broken(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError("undefined symbol")
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", broken)
    machine = read_machine()
    assert machine.providers == ()
    assert machine.onnxruntime_fault == "ImportError: undefined symbol"


def test_hptool_that_is_not_installed_has_no_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    assert read_machine().missing == {}


REQUIREMENTS = ["typer>=0.20", "torch>=2.6; extra == 'compress'", "onnxruntime>=1.24; extra == 'edge'"]


@pytest.mark.parametrize(
    ("installed", "missing"),
    [
        ({}, {"compress": ("torch>=2.6",), "edge": ("onnxruntime>=1.24",)}),
        ({"torch": "2.13.0+cpu", "onnxruntime": "1.24"}, {"compress": (), "edge": ()}),
        (
            {"torch": "2.5.1", "onnxruntime": "1.9.0"},
            {"compress": ("torch>=2.6",), "edge": ("onnxruntime>=1.24",)},
        ),
        ({"torch": "3", "onnxruntime": None, "onnxruntime-gpu": "1.26.0"}, {"compress": (), "edge": ()}),
    ],
    ids=["nothing", "enough", "too old", "the runtime for GPUs"],
)
def test_what_an_extra_lacks(installed: dict[str, str | None], missing: dict[str, tuple[str, ...]]) -> None:
    assert missing_requirements(REQUIREMENTS, installed) == missing


def test_every_requirement_of_ours_is_understood() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    plain = {
        extra: [each for each in requirements if not each.startswith("hptool[")]
        for extra, requirements in extras.items()
    }
    stated = [f"{each}; extra == '{extra}'" for extra, requirements in plain.items() for each in requirements]
    found = missing_requirements(stated, {})
    assert found == {extra: tuple(requirements) for extra, requirements in plain.items() if requirements}
