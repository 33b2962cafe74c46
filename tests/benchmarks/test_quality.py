"""Which students are one and the same, and are made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import quality
from benchmarks.quality import Cell, Subject
from toolchain.artifacts import write_json


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    directory = tmp_path_factory.mktemp("quality")
    for path in (quality.RESULTS / "quality").glob("sensitivity.*"):
        (directory / path.name).write_bytes(path.read_bytes())
    return Subject(0, directory)


def test_a_student_that_was_made_by_another_name_is_not_made_again(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Cell("HPP + PWP", 0.3, 0, "steps")
    write_json(known.path(tmp_path), {"method": known.method, "student": {"score": 0.5}})
    monkeypatch.delattr(quality, "prune")
    found = quality.measure(subject, Cell("HPP + PWP, no weight", 0.3, 0, "steps"), tmp_path)
    assert found["student"] == {"score": 0.5}
    assert found["method"] == "HPP + PWP, no weight"


@pytest.mark.parametrize(
    "name", ["HPP + PWP + SGDistill", "HPP + PWP, identity", "HPP, nothing frozen", "ours", "ours, graded"]
)
def test_one_that_learns_otherwise_is_another_student(subject: Subject, name: str) -> None:
    assert quality._twin(subject, Cell(name, 0.3, 0, "steps")) is None
