"""What a user types and what they are told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from toolchain import cli
from toolchain.artifacts import new_directory, read_json
from toolchain.errors import ToolchainError
from toolchain.families import open_model

TINY = ("--steps", "3", "--per-task", "1", "--ratio", "0.2")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hptool(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["hptool", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compress", "nosuch"), "there is no model 'nosuch'"),
        (("compress", "--ratio", "1.5"), "ratio 1.5 is out of range"),
        (("compress", "--ratio", "0.95"), "ratio 0.95 is out of range"),
        (("compress", "--output", "full"), "output full is not empty"),
        (("compress", "--output", "file/student"), "cannot write file/student"),
        (("export",), "run `hptool compress` first"),
        (("export", "shapes", "--target", "rtx409"), "rtx4090"),
        (("export", "shapes", "--bits", "5"), "4, 16 or 32"),
        (("export", "shapes", "--output", "full"), "output full is not empty"),
        (("run", "full", "a red circle"), "manifest.json"),
        (("evaluate", "nosuch"), "there is no model 'nosuch'"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    arguments: tuple[str, ...],
    message: str,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (here / "full").mkdir()
    (here / "full" / "thing").write_text("kept")
    (here / "file").write_text("kept")
    assert hptool(monkeypatch, *arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert "Traceback" not in errors
    assert sorted(path.name for path in here.rglob("*")) == ["file", "full", "thing"]


def test_a_missing_extra_is_named_with_its_install_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "toolchain.compress", None)
    monkeypatch.setitem(sys.modules, "torch", None)

    def absent(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(cli, "app", absent)
    assert hptool(monkeypatch, "compress") == 2
    assert "pip install 'hptool[compress]'" in capsys.readouterr().err


def test_compress_writes_a_student_with_its_plan(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hptool(monkeypatch, "compress", str(tiny_path), *TINY, "--json") == 0
    outcome = json.loads(capsys.readouterr().out)
    assert [stage["name"] for stage in outcome["stages"]] == ["original", "pruned", "distilled"]
    student = Path("tiny-student")
    plan = read_json(student / "plan.json")
    assert plan["removed_blocks"] == outcome["removed_blocks"]
    assert len(read_json(student / "sensitivity.json")["blocks"]) == 6
    model = open_model(str(student))
    assert model.num_parameters == outcome["stages"][-1]["num_parameters"]
    assert model.pipeline.transformer.config.num_layers == 6 - len(plan["removed_blocks"])


def test_the_same_seed_gives_the_same_student(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        assert hptool(monkeypatch, "compress", str(tiny_path), *TINY, "--output", name) == 0
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (Path("a") / weights).read_bytes() == (Path("b") / weights).read_bytes()


def test_a_model_of_another_world_needs_prompts(
    tiny_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tmp_path / "other"
    model.mkdir()
    for part in tiny_path.iterdir():
        (model / part.name).symlink_to(part)
    defaults = read_json(model / "generation_defaults.json") | {"world": None}
    (model / "generation_defaults.json").unlink()
    (model / "generation_defaults.json").write_text(json.dumps(defaults))
    assert hptool(monkeypatch, "compress", "other", *TINY) == 2
    assert "--prompts FILE" in capsys.readouterr().err

    Path("prompts.txt").write_text("\n".join(f"a picture of {index} cats" for index in range(40)))
    assert hptool(monkeypatch, "compress", "other", *TINY, "--prompts", "prompts.txt", "--json") == 0
    assert [stage["score"] for stage in json.loads(capsys.readouterr().out)["stages"]] == [None] * 3


def test_a_directory_appears_whole_or_not_at_all(here: Path) -> None:
    def fail() -> None:
        with new_directory(here / "out") as directory:
            (directory / "half").mkdir()
            (directory / "half").mkdir()

    with pytest.raises(FileExistsError):
        fail()
    assert list(here.iterdir()) == []
    with new_directory(here / "out") as directory:
        (directory / "all").write_text("written")
    assert [path.name for path in here.rglob("*")] == ["out", "all"]
    with pytest.raises(ToolchainError, match="is not empty"), new_directory(here / "out"):
        pass
