"""What is installed: the wheel's contents and what each extra asks for."""

from __future__ import annotations

import re
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[2]
PACKAGES = ("deploy", "export", "profiles", "recipes", "report", "toolchain")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    directory = tmp_path_factory.mktemp("dist")
    return zipfile.ZipFile(
        next(iter(WheelBuilder(str(ROOT)).build(directory=str(directory), versions=["standard"])))
    )


def test_wheel_holds_every_file_of_the_packages_and_no_other(wheel: zipfile.ZipFile) -> None:
    ours = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".part"
    }
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == ours


@pytest.mark.parametrize("package", PACKAGES)
def test_package_says_that_it_is_typed(wheel: zipfile.ZipFile, package: str) -> None:
    assert f"{package}/py.typed" in wheel.namelist()


def test_wheel_installs_the_command(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "hptool = toolchain.cli:main" in wheel.read(entry_points).decode()


def requirements(extra: str) -> set[str]:
    """Names of the distributions an extra asks for, those of the extras it refers to included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names: set[str] = set()
    for requirement in project["optional-dependencies"][extra]:
        if inner := re.fullmatch(r"hptool\[(.*)\]", requirement):
            names.update(*(requirements(name) for name in inner[1].split(",")))
        else:
            names.add(re.split(r"[<>=!~;\[ ]", requirement)[0])
    return names


@pytest.mark.parametrize("extra", ["edge", "edge-gpu", "rtx", "tensorrt", "sign", "hub", "oci"])
def test_a_device_installs_nothing_that_trains(extra: str) -> None:
    assert requirements(extra).isdisjoint(
        {"torch", "diffusers", "transformers", "accelerate", "nncf", "onnx"}
    )


def test_edge_and_edge_gpu_differ_in_the_runtime_alone() -> None:
    assert requirements("edge") ^ requirements("edge-gpu") == {"onnxruntime", "onnxruntime-gpu"}


def test_all_holds_one_onnxruntime() -> None:
    assert {name for name in requirements("all") if name.startswith("onnxruntime")} == {"onnxruntime"}
