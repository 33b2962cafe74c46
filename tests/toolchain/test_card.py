"""Where a model came from and on what terms it may be used stays with its students and bundles."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from toolchain.card import read_card, write_student_card
from toolchain.errors import ToolchainError
from toolchain.families import open_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write(directory: Path, metadata: str) -> None:
    (directory / "README.md").write_text(f"---\n{metadata}\n---\n\n# A model\n")


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("license: mit", "mit"),
        ("license: other\nlicense_name: stabilityai-ai-community", "stabilityai-ai-community"),
        ("license: other", "LICENSE.md"),
        ("license: [mit, apache-2.0]", "mit, apache-2.0"),
        ("tags: [image]", "LICENSE.md"),
    ],
)
def test_the_licence_is_that_of_the_card_or_else_its_file(
    tmp_path: Path, metadata: str, expected: str
) -> None:
    (tmp_path / "LICENSE.md").touch()
    write(tmp_path, metadata)
    assert read_card(tmp_path).license == expected


def test_without_a_card_and_a_file_there_is_no_licence(tmp_path: Path) -> None:
    assert read_card(tmp_path).license is None
    write(tmp_path, "license: other")
    assert read_card(tmp_path).license == "other"


@pytest.mark.parametrize("metadata", ["license: [mit", "- mit", "license: !!python/name:os.system x"])
def test_a_card_that_cannot_be_read_is_refused(tmp_path: Path, metadata: str) -> None:
    write(tmp_path, metadata)
    with pytest.raises(ToolchainError, match=r"the metadata at the top of .*README\.md cannot be read"):
        read_card(tmp_path)


def test_a_student_inherits_the_licence_and_names_its_teacher(tmp_path: Path) -> None:
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    for directory in (teacher, student):
        directory.mkdir()
    (teacher / "LICENSE.md").write_text("the terms")
    write(teacher, "license: other\nlicense_name: terms\nlicense_link: LICENSE.md")
    write_student_card(SimpleNamespace(path=teacher, repository="owner/name", revision=COMMIT), student)  # type: ignore[arg-type]
    card = read_card(student)
    assert (card.license, card.base_revision) == ("terms", COMMIT)
    assert "base_model: owner/name" in (student / "README.md").read_text()
    assert (student / "LICENSE.md").read_text() == "the terms"


def test_a_model_of_the_hub_knows_where_it_is_from_and_its_commit(tiny_path: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(tiny_path)
    cached, local = (open_model(str(path), precision="none") for path in (snapshot, tiny_path))
    assert (cached.repository, cached.revision) == ("owner/name", COMMIT)
    assert (local.repository, local.revision) == (None, None)


def test_the_model_that_comes_with_the_tool_has_a_licence() -> None:
    assert read_card(open_model("shapes", precision="none").path).license == "apache-2.0"
