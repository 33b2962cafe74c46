"""What is imported, and when: a device needs no PyTorch, and a command pays only for what it uses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]

TRAINING = {"accelerate", "diffusers", "huggingface_hub", "safetensors", "scipy", "torch", "transformers"}
EXPORTING = {"nncf", "onnx", "onnx_ir", "onnxscript", "polygraphy", "tensorrt", "tensorrt_rtx"}
DRAWING = {"PIL", "numpy", "onnxruntime", "tokenizers"}
TERMINAL = {"rich", "typer"}

# Runs a statement where some packages are not installed, and fails too if it asked for one and went on.
RUN_WITHOUT = """
import sys
from importlib.abc import MetaPathFinder

statement, *absent = sys.argv[1:]
asked_for = set()

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            asked_for.add(name)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
sys.argv = ["hptool", "--help"]
try:
    exec(statement)
finally:
    if asked_for:
        sys.exit(f"asked for {sorted(asked_for)}")
"""


def run_without(absent: set[str], statement: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", RUN_WITHOUT, statement, *sorted(absent)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_package_that_is_absent_is_noticed() -> None:
    with pytest.raises(AssertionError, match=r"asked for \['numpy'\]"):
        run_without({"numpy"}, "try:\n import numpy\nexcept ImportError: pass")


def test_deploy_imports_without_what_trains_and_exports() -> None:
    run_without(TRAINING | EXPORTING, "import deploy")


def test_every_module_of_deploy_imports_without_what_trains() -> None:
    modules = grimp.build_graph("deploy", cache_dir=None).modules
    run_without(TRAINING | {"nncf", "onnx", "onnx_ir", "onnxscript"}, f"import {', '.join(sorted(modules))}")


def test_profiles_load_with_the_standard_library_alone() -> None:
    run_without(
        TRAINING | EXPORTING | DRAWING | TERMINAL,
        "from profiles.schema import available_profiles, load_profile\n"
        "assert [load_profile(name) for name in available_profiles()]",
    )


def test_help_is_shown_by_a_base_installation() -> None:
    shown = run_without(TRAINING | EXPORTING | DRAWING, "from toolchain.cli import main; main()")
    assert "compress" in shown
    assert "export" in shown


def test_the_doctor_needs_a_base_installation_alone() -> None:
    run_without(TRAINING | EXPORTING | DRAWING, "import deploy.doctor, deploy.machine, profiles.page")


def test_export_sees_only_the_doors_of_its_neighbours() -> None:
    """The arrows as a list of what is allowed; `lint-imports` holds the ones that are forbidden."""
    doors = (
        "toolchain.artifacts",
        "toolchain.card",
        "toolchain.errors",
        "toolchain.garbage",
        "toolchain.families",
        "toolchain.progress",
        "toolchain.trajectories",
        "profiles",
        "deploy.bundle",
        "deploy.choice",
        "deploy.engine",
        "deploy.errors",
        "deploy.kept",
        "deploy.memory",
        "deploy.tiles",
    )
    graph = grimp.build_graph("toolchain", "export", "deploy", "profiles", cache_dir=None)
    seen = {
        imported
        for module in graph.find_descendants("export") | {"export"}
        for imported in graph.find_modules_directly_imported_by(module)
        if not imported.startswith("export.")
    }
    assert {name for name in seen if not any(f"{name}.".startswith(f"{door}.") for door in doors)} == set()
