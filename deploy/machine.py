"""What this machine is and what is installed on it, as far as that decides what can be exported and run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.gpu import Gpus, read_gpus
from deploy.memory import available_bytes, total_bytes
from deploy.prepared import cache_directory

__all__ = ["Machine", "missing_requirements", "read_machine"]

_DISTRIBUTIONS = {
    **{
        name: (name,)
        for name in ("torch", "diffusers", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "nncf")
    },
    "polygraphy": ("polygraphy",),
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx"),
}
"""Of each package, the names it is distributed under."""

_INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512-VNNI",
    "amx_int8": "AMX",
    "asimd": "NEON",
    "asimddp": "NEON dotprod",
    "i8mm": "NEON i8mm",
}
"""Those that onnxruntime's matrix products are several times as fast with, by Linux's names."""

_ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}

_REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+)\s*(?P<extras>\[[\w, -]+\])?\s*(?:>=\s*(?P<least>[\d.]+))?"
    r"\s*;\s*extra\s*==\s*['\"](?P<extra>[\w-]+)['\"]"
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What was found."""

    python: str
    system: str
    """Linux, Windows or Darwin."""
    platform: str
    """The system and its version, for people."""
    architecture: str
    """x86_64, aarch64 or what the system calls another."""
    processor: str
    instructions: tuple[str, ...] | None
    """Of those that matter, which the processor has; None where the system does not say."""
    num_cores: int
    """That this process may use."""
    memory_bytes: int | None
    available_bytes: int | None
    cache: str
    disk_bytes: int
    """Free where `cache` lies or is going to."""
    gpus: Gpus
    packages: dict[str, str]
    """Versions of what is installed, by name."""
    providers: tuple[str, ...]
    """onnxruntime's execution providers."""
    onnxruntime_fault: str | None = None
    """Why an onnxruntime that is installed cannot be imported."""
    missing: dict[str, tuple[str, ...]]
    """What each extra of hptool lacks, nothing if it is complete; empty where hptool is not installed."""


def read_machine(root: Path = Path("/")) -> Machine:
    """Look at this machine. Of the packages, onnxruntime alone is imported.

    Args:
        root: Directory that `proc` and `sys` lie in.
    """
    packages = _packages()
    providers, fault = _providers(packages)
    cache = cache_directory()
    machine = platform.machine().lower()
    name, instructions = _processor(root)
    return Machine(
        python=f"{platform.python_version()} ({sys.executable})",
        system=platform.system(),
        platform=platform.platform(),
        architecture=_ARCHITECTURES.get(machine, machine),
        processor=name,
        instructions=instructions,
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=total_bytes(root),
        available_bytes=available_bytes(root),
        cache=str(cache),
        disk_bytes=shutil.disk_usage(_existing(cache)).free,
        gpus=read_gpus(),
        packages=packages,
        providers=providers,
        onnxruntime_fault=fault,
        missing=_missing(),
    )


def missing_requirements(
    requirements: Iterable[str], installed: Mapping[str, str | None]
) -> dict[str, tuple[str, ...]]:
    """Return what each extra lacks, from the requirements in a distribution's metadata.

    Args:
        requirements: As `torch>=2.6; extra == 'compress'`; those without an extra do not count. An extra
            that holds another names its requirements too.
        installed: Version of each distribution; None if it is not installed.
    """
    lacking: dict[str, list[str]] = {}
    for requirement in requirements:
        if "extra" not in requirement.partition(";")[2]:
            continue
        found = _REQUIREMENT.fullmatch(requirement)
        assert found, f"a requirement of an unknown form: {requirement}"
        lacks = lacking.setdefault(found["extra"], [])
        if not _fulfilled(found["name"], found["least"], installed):
            least = f">={found['least']}" if found["least"] else ""
            lacks.append(found["name"] + (found["extras"] or "") + least)
    return {extra: tuple(lacks) for extra, lacks in lacking.items()}


def _fulfilled(name: str, least: str | None, installed: Mapping[str, str | None]) -> bool:
    # The two have the same modules, and whoever needs the one can do with the other.
    names = ("onnxruntime", "onnxruntime-gpu") if name == "onnxruntime" else (name,)
    versions = [version for version in map(installed.get, names) if version is not None]
    return any(least is None or _release(version) >= _release(least) for version in versions)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])


def _missing() -> dict[str, tuple[str, ...]]:
    try:
        requirements = importlib.metadata.requires("hptool") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    names = {re.split(r"[<>=!~;\[ ]", requirement)[0] for requirement in requirements}
    installed = {name: _version(name) for name in names | {"onnxruntime-gpu"}}
    return missing_requirements(requirements, installed)


def _packages() -> dict[str, str]:
    found = {
        package: next(filter(None, map(_version, names)), None) for package, names in _DISTRIBUTIONS.items()
    }
    return {package: version for package, version in found.items() if version is not None}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _providers(packages: Mapping[str, str]) -> tuple[tuple[str, ...], str | None]:
    if packages.keys().isdisjoint({"onnxruntime", "onnxruntime-gpu"}):
        return (), None
    try:
        import onnxruntime

        return tuple(onnxruntime.get_available_providers()), None
    except Exception as error:  # two packages' files mixed fail in any way
        return (), f"{type(error).__name__}: {error}"


def _processor(root: Path) -> tuple[str, tuple[str, ...] | None]:
    """The processor's name, or the board's where it has none, and its instructions."""
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine(), None
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    instructions = tuple(name for flag, name in _INSTRUCTIONS.items() if flag in flags)
    try:
        board = (root / "proc/device-tree/model").read_text(encoding="utf-8").strip("\0\n")
    except OSError:
        board = platform.machine()
    return facts.get("model name") or board, instructions


def _existing(path: Path) -> Path:
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
