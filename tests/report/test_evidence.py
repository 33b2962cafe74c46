"""What a report reads, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from report.evidence import PARITY_FILE, read_evidence
from toolchain.artifacts import read_json, write_json
from toolchain.compress import REPORT_FILE
from toolchain.errors import ToolchainError
from toolchain.history import HISTORY_FILE
from toolchain.plan import PLAN_FILE, SENSITIVITY_FILE


def test_a_student_is_found_from_its_bundle(student: Path, bundle: Path) -> None:
    evidence = read_evidence([bundle])
    assert evidence.student is not None
    assert evidence.student.path == student
    assert evidence.missing == ""


def test_a_bundle_is_found_beside_its_student(student: Path, bundle: Path) -> None:
    evidence = read_evidence([student])
    assert evidence.bundle is not None
    assert evidence.bundle.bundle.path == bundle.resolve()


def test_a_bundle_of_another_student_is_not_taken_for_its_own(student: Path, bundle: Path) -> None:
    plan = read_json(student / PLAN_FILE)
    write_json(student / PLAN_FILE, plan | {"asked": {"by": "hand"}})
    assert read_evidence([student]).bundle is None
    assert read_evidence([bundle]).student is None
    with pytest.raises(ToolchainError, match="was not made of"):
        read_evidence([student, bundle])


def test_what_an_untrained_student_lacks_is_none(student: Path) -> None:
    (student / HISTORY_FILE).unlink()
    (student / SENSITIVITY_FILE).unlink()
    found = read_evidence([student]).student
    assert found is not None
    assert (found.history, found.sensitivity) == (None, None)


@pytest.mark.parametrize(("make", "found"), [(True, "without plan.json"), (False, "no directory")])
def test_a_directory_that_is_neither_is_refused(tmp_path: Path, make: bool, found: str) -> None:
    path = tmp_path / "other"
    if make:
        path.mkdir()
    with pytest.raises(ToolchainError, match=f"is neither a student nor a bundle: it is {found}"):
        read_evidence([path])


def test_two_students_are_refused(student: Path, tmp_path: Path) -> None:
    shutil.copytree(student, tmp_path / "second")
    with pytest.raises(ToolchainError, match="one student and its bundle"):
        read_evidence([student, tmp_path / "second"])


@pytest.mark.parametrize(
    ("name", "message"),
    [(REPORT_FILE, "unknown key 'more'"), (HISTORY_FILE, "this history is damaged: .*'more'")],
)
def test_an_unknown_key_and_another_version_are_refused(student: Path, name: str, message: str) -> None:
    values = read_json(student / name)
    write_json(student / name, values | {"more": [1]})
    with pytest.raises(ToolchainError, match=message):
        read_evidence([student])
    write_json(student / name, values | {"schema_version": 99})
    with pytest.raises(ToolchainError, match=r"schema[_ ]version.* 99"):
        read_evidence([student])


def test_an_altered_bundle_is_refused(bundle: Path) -> None:
    (bundle / PARITY_FILE).write_text("{}")
    with pytest.raises(Exception, match=PARITY_FILE):
        read_evidence([bundle])


def test_a_file_of_another_command_is_refused(student: Path, tmp_path: Path) -> None:
    other = tmp_path / "fit.json"
    other.write_text(json.dumps({"model": "toy"}))
    with pytest.raises(ToolchainError, match="`hptool bench --json` prints such a file"):
        read_evidence([student], benches=[other])
