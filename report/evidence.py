"""What the stages left in their directories, read strictly; nothing is opened that could run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from deploy.bench import Bench
from deploy.bundle import MANIFEST, Bundle, open_bundle
from export.blockwise import BlockRow
from export.drift import Drift
from export.engine import ENGINES, EngineReport
from export.fit import Fit
from export.parity import ParityRow
from export.quantize import QuantReport
from profiles.typed import TypedDataError, from_data
from toolchain.artifacts import read_json, sha256
from toolchain.compress import REPORT_FILE, REPORT_VERSION, Outcome
from toolchain.errors import ToolchainError
from toolchain.evaluate import ShapesScore
from toolchain.history import HISTORY_FILE, History, history_from_json
from toolchain.plan import (
    PLAN_FILE,
    SENSITIVITY_FILE,
    CompressionPlan,
    Sensitivity,
    plan_from_json,
    sensitivity_from_json,
)

__all__ = ["PARITY_FILE", "BundleRun", "Evidence", "Parity", "StudentRun", "read_evidence"]

PARITY_FILE = "parity.json"

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class StudentRun:
    """A student's directory."""

    path: Path
    plan: CompressionPlan
    plan_sha256: str
    recipe: dict[str, Any]
    outcome: Outcome
    sensitivity: Sensitivity | None
    """None where the rule needed no analysis."""
    history: History | None


@dataclass(frozen=True, kw_only=True)
class Parity:
    """What an export measured."""

    rows: list[ParityRow]
    """None of a bundle that was exported without comparing."""
    blocks: list[BlockRow]
    drift: list[Drift]
    float32_blocks: list[str]
    quantization: dict[str, QuantReport]


@dataclass(frozen=True, kw_only=True)
class BundleRun:
    """A bundle's directory."""

    bundle: Bundle
    parity: Parity
    engines: list[EngineReport]

    @property
    def weights(self) -> str:
        """How the transformer's linears are stored, for people."""
        return self.bundle.manifest.graphs["transformer"][0].weights.upper()


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All there is to report, and what is missing."""

    student: StudentRun | None
    bundle: BundleRun | None
    missing: str
    """Why there is no student or no bundle; empty where there are both."""
    benches: Mapping[str, Bench]
    """By the file that was given, as the others."""
    fits: Mapping[str, Fit]
    scores: Mapping[str, ShapesScore]
    """Of the bundle."""


def read_evidence(
    paths: Sequence[Path],
    *,
    benches: Sequence[Path] = (),
    fits: Sequence[Path] = (),
    scores: Sequence[Path] = (),
) -> Evidence:
    """Read a student, a bundle or both; of one alone the other is looked for where it was made.

    Args:
        paths: One directory, or two.
        benches: What `hptool bench --json` printed.
        fits: What `hptool fit --json` printed.
        scores: What `hptool evaluate --json` printed of the bundle.

    Raises:
        ToolchainError: A directory is neither, two are of different models, or a file is not what it should
            be.
        DeployError: A bundle is damaged.
    """
    students = [path for path in paths if (path / PLAN_FILE).is_file() and (path / REPORT_FILE).is_file()]
    bundles = [path for path in paths if (path / MANIFEST).is_file()]
    for path in paths:
        if path not in (*students, *bundles):
            found = "no directory" if not path.is_dir() else f"without {PLAN_FILE} and {REPORT_FILE}"
            raise ToolchainError(
                f"{path} is neither a student nor a bundle: it is {found}, and has no {MANIFEST}; give a "
                "directory that `hptool compress` or `hptool export` wrote"
            )
    if len(students) > 1 or len(bundles) > 1:
        raise ToolchainError(
            f"a report is of one student and its bundle, not of {', '.join(map(str, paths))}; "
            "make one of each"
        )
    student = _read_student(students[0]) if students else None
    bundle = _read_bundle(bundles[0]) if bundles else None
    missing = ""
    if student is not None and bundle is None:
        bundle, missing = _bundle_of(student)
    elif bundle is not None and student is None:
        student, missing = _student_of(bundle)
    elif student is not None and bundle is not None and not _belong(student, bundle):
        raise ToolchainError(
            f"{bundles[0]} was not made of {students[0]}: the plan behind it has another digest; "
            "give the student it was exported from"
        )
    return Evidence(
        student=student,
        bundle=bundle,
        missing=missing,
        benches={str(path): _typed(path, Bench, "bench") for path in benches},
        fits={str(path): _typed(path, Fit, "fit") for path in fits},
        scores={str(path): _typed(path, ShapesScore, "evaluate") for path in scores},
    )


def _read_student(path: Path) -> StudentRun:
    values = _versioned(path / REPORT_FILE, REPORT_VERSION)
    recipe = values.pop("recipe", None)
    if not isinstance(recipe, dict):
        raise ToolchainError(f"{path / REPORT_FILE} has no recipe; compress the model again")
    sensitivity, history = path / SENSITIVITY_FILE, path / HISTORY_FILE
    return StudentRun(
        path=path,
        plan=plan_from_json(read_json(path / PLAN_FILE)),
        plan_sha256=sha256(path / PLAN_FILE),
        recipe=recipe,
        outcome=_data(path / REPORT_FILE, Outcome, values),
        sensitivity=sensitivity_from_json(read_json(sensitivity)) if sensitivity.exists() else None,
        history=history_from_json(read_json(history)) if history.exists() else None,
    )


def _read_bundle(path: Path) -> BundleRun:
    bundle = open_bundle(path)
    engines = []
    if ENGINES in bundle.manifest.files:
        listed = _versioned(path / ENGINES, 1).get("engines", [])
        engines = [_data(path / ENGINES, EngineReport, item) for item in listed]
    parity = _data(path / PARITY_FILE, Parity, _versioned(path / PARITY_FILE, 2))
    return BundleRun(bundle=bundle, parity=parity, engines=engines)


def _bundle_of(student: StudentRun) -> tuple[BundleRun | None, str]:
    """The bundle that `hptool export` makes of it, unless told otherwise."""
    path = student.path.resolve()
    beside = path.with_name(path.name.removesuffix("-student") + "-bundle")
    if not (beside / MANIFEST).is_file():
        return None, f"No bundle was given, and there is none at {beside.name} beside {student.path.name}."
    bundle = _read_bundle(beside)
    if not _belong(student, bundle):
        return None, f"No bundle was given, and {beside.name} was made of another student."
    return bundle, ""


def _student_of(bundle: BundleRun) -> tuple[StudentRun | None, str]:
    """The student that a bundle says it was made of."""
    path = Path(bundle.bundle.manifest.provenance.model)
    if not (path / PLAN_FILE).is_file() or not (path / REPORT_FILE).is_file():
        return None, f"The bundle was made of {path}, and there is no student of that name here."
    student = _read_student(path)
    if not _belong(student, bundle):
        return None, f"The bundle was made of {path}, which holds another student now."
    return student, ""


def _belong(student: StudentRun, bundle: BundleRun) -> bool:
    return student.plan_sha256 == bundle.bundle.manifest.provenance.plan_sha256


def _versioned(path: Path, version: int) -> dict[str, Any]:
    values = read_json(path)
    if (found := values.pop("schema_version", None)) != version:
        raise ToolchainError(
            f"{path} has schema_version {found}, and this version of hptool reads {version}; make it again"
        )
    return values


def _typed(path: Path, kind: type[_T], command: str) -> _T:
    return _data(path, kind, read_json(path), f"`hptool {command} --json` prints such a file")


def _data(path: Path, kind: type[_T], values: Any, hint: str = "make it again") -> _T:
    try:
        return from_data(kind, values)
    except TypedDataError as error:
        raise ToolchainError(f"{path} cannot be used: {error}; {hint}") from error
