"""What a user types and what they are told."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from toolchain import cli, compress
from toolchain.artifacts import read_json
from toolchain.families import open_model
from toolchain.shapes.world import TASKS

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
        (("compress", "a/b/c"), "there is no model 'a/b/c'"),
        (("compress", "full"), "without model_index.json"),
        (("compress", "flux"), "flux is a FluxPipeline; supported: StableDiffusion3Pipeline"),
        (("compress", "--ratio", "0"), "ratio 0.0 is out of range"),
        (("compress", "--ratio", "-0.5"), "ratio -0.5 is out of range"),
        (("compress", "--ratio", "nan"), "ratio nan is out of range"),
        (("compress", "--ratio", "1.5"), "ratio 1.5 is out of range"),
        (("compress", "--ratio", "0.95"), "ratio 0.95 is out of range"),
        (("compress", "--output", "full"), "output full is not empty"),
        (("compress", "--output", "file"), "output file is a file"),
        (("compress", "--output", "file/student"), "cannot write file/student"),
        (("compress", "--prompts", "nosuch.txt"), "the prompts in nosuch.txt cannot be read"),
        (("compress", "--prompts", "file"), "file holds 1 prompts; at least 32 are needed"),
        (("export",), "run `hptool compress` first"),
        (("export", "nosuch"), "there is no model 'nosuch'"),
        (("export", "shapes", "--target", "rtx409"), "Did you mean rtx4090?"),
        (("export", "shapes", "--target", "cpu-x86", "--target", "rtx409"), "Did you mean rtx4090?"),
        (("export", "shapes", "--bits", "5"), "4, 16 or 32"),
        (("export", "shapes", "--output", "full"), "output full is not empty"),
        (("run", "full", "a red circle"), "manifest.json"),
        (("run", "nosuch", "a red circle"), "nosuch"),
        (("run", "full", "a red circle", "--output", "full"), "cannot write full"),
        (("run", "full", "a red circle", "--output", "nosuch/out.png"), "cannot write nosuch/out.png"),
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
    (here / "flux").mkdir()
    (here / "flux" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert hptool(monkeypatch, *arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1
    names = sorted(path.name for path in here.rglob("*"))
    assert names == ["file", "flux", "full", "model_index.json", "thing"]
    assert (here / "file").read_text() == (here / "full" / "thing").read_text() == "kept"


@pytest.mark.parametrize(
    ("arguments", "package", "importers", "extra"),
    [
        (("compress",), "torch", ("toolchain.compress", "toolchain.analysis"), "compress"),
        (
            ("compress",),
            "scipy",
            ("toolchain.compress", "toolchain.evaluate", "toolchain.shapes.detector"),
            "compress",
        ),
        (("export", "shapes"), "onnx_ir", ("export.bundle",), "export"),
        (("run", "bundle", "a circle"), "onnxruntime", ("deploy.pipeline", "deploy.session"), "edge"),
        (("run", "bundle", "a circle"), "tokenizers", ("deploy.pipeline",), "edge"),
    ],
)
def test_a_command_without_its_packages_says_what_to_install(
    arguments: tuple[str, ...],
    package: str,
    importers: tuple[str, ...],
    extra: str,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for name in importers:
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert hptool(monkeypatch, *arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert package in errors
    assert f"pip install 'hptool[{extra}]'" in errors
    assert len(errors.splitlines()) == 1
    assert list(here.iterdir()) == []


def test_a_missing_package_of_no_extra_is_no_error_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise ModuleNotFoundError("No module named 'strange'", name="strange")

    monkeypatch.setattr(cli, "app", absent)
    with pytest.raises(ModuleNotFoundError):
        cli.main()


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
    report = read_json(student / "report.json")
    assert (report["schema_version"], report["recipe"]["ratio"], report["recipe"]["steps"]) == (1, 0.2, 3)
    assert {name: report[name] for name in outcome} == outcome
    assert StableDiffusion3Pipeline.from_pretrained(student, text_encoder_3=None, tokenizer_3=None)
    assert sorted(path.name for path in Path().iterdir()) == [".hptool.json", "tiny-student"]


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


def test_the_teacher_on_disk_stays_as_it_is(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in tiny_path.rglob("*") if path.is_file()}
    assert hptool(monkeypatch, "compress", str(tiny_path), *TINY) == 0
    assert {path: path.read_bytes() for path in tiny_path.rglob("*") if path.is_file()} == before


def test_a_person_is_told_the_stages_and_what_to_type_next(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert hptool(monkeypatch, "compress", str(tiny_path), *TINY, "--output", "small") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("original", "pruned", "distilled", "velocity error", "ShapesEval"))
    assert "Student written to small.  Next:  hptool export" in shown
    assert read_json(Path(".hptool.json"))["student"] == "small"


def test_no_steps_only_prune_and_no_captions_leave_out_the_scores(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--steps", "0", "--per-task", "0", "--ratio", "0.2", "--json")
    assert hptool(monkeypatch, "compress", str(tiny_path), *arguments) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [(stage["name"], stage["score"]) for stage in stages] == [("original", None), ("pruned", None)]
    assert stages[0]["velocity_error"] < 1e-8 < stages[1]["velocity_error"]
    assert stages[1]["num_parameters"] <= 0.8 * stages[0]["num_parameters"]


def test_a_student_can_be_compressed_again(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hptool(monkeypatch, "compress", str(tiny_path), *TINY, "--output", "once") == 0
    assert hptool(monkeypatch, "compress", "once", *TINY, "--output", "twice") == 0
    layers = [open_model(name).pipeline.transformer.config.num_layers for name in ("once", "twice")]
    assert layers[1] < layers[0] < 6
    assert read_json(Path("twice/plan.json"))["model"] == "once"


def test_what_fails_while_a_student_is_written_leaves_nothing(
    tiny_path: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object, path: Path) -> None:
        (path / "half").write_text("written")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compress, "save_model_", full)
    monkeypatch.setattr(sys, "argv", ["hptool", "compress", str(tiny_path), *TINY])
    with pytest.raises(OSError, match="No space left"):
        cli.main()
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ("{", "cannot be read as JSON"),
        ('{"student": "gone"}', "there is no model 'gone'"),
        pytest.param("{}", "hptool"),
    ],
)
def test_a_memory_that_leads_nowhere_is_one_message(
    memory: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(".hptool.json").write_text(memory)
    assert hptool(monkeypatch, "export") == 2
    assert message in capsys.readouterr().err


def test_a_model_that_paints_nothing_finite_is_one_message(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_path, "nan")
    weights = Path("nan/transformer/diffusion_pytorch_model.safetensors")
    save_file(
        load_file(weights) | {"proj_out.bias": torch.full((32,), float("nan"))}, weights, {"format": "pt"}
    )
    assert hptool(monkeypatch, "compress", "nan", *TINY) == 2
    assert "finite" in capsys.readouterr().err


def test_evaluate_scores_a_model_of_the_shapes_world_task_by_task(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hptool(monkeypatch, "evaluate", str(tiny_path), "--per-task", "1", "--json") == 0
    score = json.loads(capsys.readouterr().out)
    assert list(score["tasks"]) == list(TASKS)
    assert (score["num_per_task"], score["seed"]) == (1, 0)


def test_a_model_of_another_world_is_not_scored(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_path, "other")
    Path("other/generation_defaults.json").unlink()
    assert hptool(monkeypatch, "evaluate", "other", "--per-task", "1") == 2
    assert "other is not a model of the shapes world" in capsys.readouterr().err
