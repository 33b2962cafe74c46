"""What of a student is published, and what its card says."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from deploy import transfer
from toolchain import cli
from toolchain.artifacts import read_json, write_json
from toolchain.errors import ToolchainError
from toolchain.families import open_model
from toolchain.publish import student_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def students(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two: `blocks` lost one, `components` lost less; their teacher is on the hub and has terms."""
    directory = tmp_path_factory.mktemp("students")
    teacher = directory / "models--maker--original" / "snapshots" / COMMIT
    shutil.copytree(tiny_path, teacher)
    (teacher / "LICENSE.md").write_text("the terms")
    write_card(teacher, license="other", license_name="terms", license_link="LICENSE.md")
    for name, removed in (("blocks", "3"), ("components", "3.ff")):
        command = ["compress", str(teacher), "--remove", removed, "--steps", "1", "--per-task", "1"]
        with pytest.raises(SystemExit):
            cli.app([*command, "-o", str(directory / name)])
    return directory


def write_card(directory: Path, **values: str) -> None:
    (directory / "README.md").write_text(
        "---\n" + "".join(f"{k}: {v}\n" for k, v in values.items()) + "---\n"
    )


def card(directory: Path) -> ModelCard:
    held = student_files(directory, "owner/name")["README.md"]
    assert isinstance(held, bytes)
    return ModelCard(held.decode())


def test_what_is_published_opens_and_nothing_else_is(students: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(students / "components", student)
    (student / "weights.bin").write_bytes(b"pickled")
    (student / "notes").mkdir()
    (student / "notes" / "mine.md").write_text("private")
    files = student_files(student, "owner/name")
    assert {"weights.bin", "notes/mine.md"}.isdisjoint(files)
    assert {
        "plan.json",
        "report.json",
        "LICENSE.md",
        "README.md",
        "plan.png",
        "model_index.json",
    } <= files.keys()
    for name, held in files.items():
        path = tmp_path / "published" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(held if isinstance(held, bytes) else held.read_bytes())
    ours, theirs = (open_model(str(path)) for path in (student, tmp_path / "published"))
    assert ours.num_parameters == theirs.num_parameters
    assert (tmp_path / "published/plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_card_names_base_licence_and_what_was_done(students: Path) -> None:
    made = card(students / "components")
    assert made.data.license == "other"
    assert made.data.to_dict()["license_name"] == "terms"
    assert made.data.to_dict()["base_model_revision"] == COMMIT
    assert made.data.base_model == "maker/original"
    assert "[maker/original](https://huggingface.co/maker/original), made smaller" in made.text
    assert "![What was removed" in made.text
    assert "(plan.png)" in made.text
    assert "terms, see [LICENSE.md](LICENSE.md)" in made.text
    report = read_json(students / "components/report.json")
    rows = re.findall(r"^\| (original|pruned|distilled) \| ([\d,]+) ", made.text, re.MULTILINE)
    assert rows == [(stage["name"], f"{stage['num_parameters']:,}") for stage in report["stages"]]
    assert "Taught for 1 steps of 64 states" in made.text


def test_the_card_says_how_to_open_it(students: Path) -> None:
    assert 'open_model("owner/name").pipeline' in card(students / "components").text
    plain = card(students / "blocks").text
    assert 'StableDiffusion3Pipeline.from_pretrained("owner/name")' in plain
    assert "num_inference_steps=2,\n    guidance_scale=3.0," in plain


def test_the_card_names_adapters_and_terms_go_along_whatever_their_files_are_called(
    students: Path, tmp_path: Path
) -> None:
    student = tmp_path / "student"
    shutil.copytree(students / "blocks", student)
    (student / "licence.txt").write_text("more terms")
    adapters = ["/home/me/style.safetensors:0.5", "owner/other:1"]
    write_json(student / "report.json", read_json(student / "report.json") | {"adapters": adapters})
    assert " with the adapters style.safetensors:0.5, owner/other:1 baked in" in card(student).text
    assert student_files(student, "owner/name")["licence.txt"] == student / "licence.txt"


def test_text_that_stands_in_the_card_is_kept(students: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(students / "blocks", student)
    readme = student / "README.md"
    readme.write_text(readme.read_text() + "\n# Ours\n")
    made = card(student)
    assert made.text.strip() == "# Ours"
    assert made.data.license == "other"


@pytest.mark.parametrize("name", ["plan.json", "report.json", "README.md"])
def test_a_directory_that_is_no_student_is_refused(students: Path, tmp_path: Path, name: str) -> None:
    student = tmp_path / "student"
    shutil.copytree(students / "blocks", student)
    (student / name).unlink()
    with pytest.raises(ToolchainError, match=rf"no student that `hptool compress` wrote: it lacks {name}"):
        student_files(student, "owner/name")


def test_a_student_whose_weights_are_not_whole_is_refused(students: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(students / "blocks", student)
    (student / "transformer/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ToolchainError, match="safetensors"):
        student_files(student, "owner/name")


def test_a_report_of_another_version_is_one_error(students: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(students / "blocks", student)
    report = read_json(student / "report.json")
    del report["stages"]
    write_json(student / "report.json", report)
    with pytest.raises(ToolchainError, match="does not say 'stages'"):
        student_files(student, "owner/name")


def test_as_typed_a_student_is_pushed(
    students: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pushed = []
    monkeypatch.setattr(
        transfer, "push_files", lambda files, place, **how: pushed.append((files, place, how))
    )
    monkeypatch.setattr(
        sys, "argv", ["hptool", "push", str(students / "blocks"), "hf://owner/name@v2", "--json"]
    )
    with pytest.raises(SystemExit):
        cli.main()
    shown = json.loads(capsys.readouterr().out)
    ((files, place, how),) = pushed
    assert (place, how) == ("hf://owner/name@v2", {"message": "hptool push blocks", "private": False})
    assert shown["files"] == sorted(files)
    assert b'from_pretrained("owner/name")' in files["README.md"]
