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

from tests.typed import hptool
from toolchain import cli, compress
from toolchain.artifacts import read_json
from toolchain.families import open_model
from toolchain.history import history_from_json
from toolchain.plan import plan_from_json, sensitivity_from_json
from toolchain.rules import format_units
from toolchain.shapes.world import TASKS

TINY = ("--steps", "3", "--per-task", "1", "--ratio", "0.2")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compress", "nosuch"), "there is no model 'nosuch'"),
        (("compress", "a/b/c"), "there is no model 'a/b/c'"),
        (("compress", "full"), "without model_index.json"),
        (("compress", "sana"), "sana is a SanaPipeline"),
        (("compress", "--ratio", "0"), "ratio 0.0 is out of range"),
        (("compress", "--ratio", "-0.5"), "ratio -0.5 is out of range"),
        (("compress", "--ratio", "nan"), "ratio nan is out of range"),
        (("compress", "--ratio", "1.5"), "ratio 1.5 is out of range"),
        (("compress", "--ratio", "0.999"), "ratio 0.999 is out of range"),
        (
            ("compress", "--ratio", "0.2", "--max-bytes", "9"),
            "a budget is one of ratio, max_bytes and max_flops",
        ),
        (("compress", "--max-bytes", "90000000"), "nothing needs to go"),
        (("compress", "--remove", "3-1"), "the range '3-1' runs backwards"),
        (("compress", "--remove", "3,2-4"), "3 is removed twice"),
        (("compress", "--remove", "16"), "there is no block 16"),
        (("compress", "--remove", "3.mlp"), "block 3 has no component 'mlp'"),
        (("compress", "--remove", "0-15"), "removes every block"),
        (("compress", "--remove", "3", "--ratio", "0.2"), "--remove says what goes"),
        (("compress", "--plan", "nosuch.json"), "nosuch.json"),
        (("compress", "--plan", "other.json"), "this is no plan of schema version 3"),
        (("compress", "--analysis", "other.json"), "this is no analysis of schema version 2"),
        (("plan", "other.json"), "this is no plan of schema version 3"),
        (("analyze", "--metric", "beauty"), "the metric 'beauty' is not installed"),
        (("analyze", "--metric", "clip"), "the metric 'clip' needs"),
        (("compress", "--output", "full"), "output full is not empty"),
        (("compress", "--output", "file"), "output file is a file"),
        (("compress", "--output", "file/student"), "cannot write file/student"),
        (("compress", "--prompts", "nosuch.txt"), "the prompts in nosuch.txt cannot be read"),
        (("compress", "--prompts", "file"), "file holds 1 prompts; at least 32 are needed"),
        (("export",), "run `hptool compress` first"),
        (("export", "nosuch"), "there is no model 'nosuch'"),
        (("export", "shapes", "--target", "rtx409"), "Did you mean rtx4090?"),
        (("export", "shapes", "--target", "cpu-x86", "--target", "rtx409"), "Did you mean rtx4090?"),
        (("export", "shapes", "--bits", "5"), "4, 8, 16 or 32 bits, not 5"),
        (("export", "shapes", "--bits", "few"), "--bits is 4, 8, 16, 32 or auto, not 'few'"),
        (("export", "shapes", "--bits", "auto"), "--bits auto needs --calibration"),
        (("export", "shapes", "--max-bytes", "9"), "--max-bytes is for --bits auto"),
        (("export", "shapes", "--no-compare", "--max-error", "0.1"), "leave one of them out"),
        (("export", "shapes", "--without", "t5"), "shapes has no T5"),
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
    (here / "sana").mkdir()
    (here / "sana" / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    (here / "other.json").write_text("{}")
    assert hptool(monkeypatch, *arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1
    names = sorted(path.name for path in here.rglob("*"))
    assert names == ["file", "full", "model_index.json", "other.json", "sana", "thing"]
    assert (here / "file").read_text() == (here / "full" / "thing").read_text() == "kept"


@pytest.mark.parametrize(
    ("arguments", "package", "importers", "extra"),
    [
        (("compress",), "torch", ("toolchain.compress", "toolchain.analysis"), "compress"),
        (
            ("compress",),
            "scipy",
            ("toolchain.compress", "toolchain.judge", "toolchain.evaluate", "toolchain.shapes.detector"),
            "compress",
        ),
        (("export", "shapes"), "onnx_ir", ("export.bundle", "export.components"), "export"),
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

    monkeypatch.setattr(cli.shell, "app", absent)
    with pytest.raises(ModuleNotFoundError):
        cli.main()


def test_compress_writes_a_student_with_its_plan(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hptool(monkeypatch, "compress", str(tiny_path), *TINY, "--json") == 0
    outcome = json.loads(capsys.readouterr().out)
    assert [stage["name"] for stage in outcome["stages"]] == ["original", "pruned", "distilled"]
    student = Path("tiny-student")
    plan = plan_from_json(read_json(student / "plan.json"))
    assert format_units(plan.removed) == outcome["removed"]
    assert plan.ratio_reached == outcome["ratio_reached"] >= 0.2
    analysis = sensitivity_from_json(read_json(student / "sensitivity.json"))
    assert len(analysis.geometry.blocks) == 6
    model = open_model(str(student))
    assert model.num_parameters == plan.reached.parameters == outcome["stages"][-1]["num_parameters"]
    report = read_json(student / "report.json")
    assert (report["schema_version"], report["recipe"]["steps"]) == (3, 3)
    assert report["recipe"]["decision"]["budget"]["ratio"] == 0.2
    assert {name: report[name] for name in outcome} == outcome
    assert len(history_from_json(read_json(student / "history.json")).losses) == 3
    assert sorted(path.name for path in Path().iterdir()) == [".hptool.json", "tiny-student"]


def test_a_student_without_whole_blocks_is_a_plain_diffusers_pipeline(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hptool(monkeypatch, "compress", str(tiny_path), "--remove", "2-3", "--steps", "2", *TINY[2:4]) == 0
    pipeline = StableDiffusion3Pipeline.from_pretrained("tiny-student", text_encoder_3=None, tokenizer_3=None)
    assert pipeline.transformer.config.num_layers == 4


@pytest.mark.parametrize("family", ["tiny_dual_path", "tiny_flux_path"])
def test_analyze_plan_and_compress_work_alike_for_every_family(
    family: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Components go, and the student is to the bit what was opened, pruned and written."""
    model = str(request.getfixturevalue(family))
    Path("prompts.txt").write_text("\n".join(f"a picture of {index} cats" for index in range(8)))
    few = ("--prompts", "prompts.txt", "--num-prompts", "2")
    assert hptool(monkeypatch, "analyze", model, *few, "-o", "analysis") == 0
    assert Path("analysis/sensitivity.png").stat().st_size > 10_000
    assert (
        hptool(monkeypatch, "plan", model, *few, "--analysis", "analysis/sensitivity.json", "-o", "plan.json")
        == 0
    )
    plan = plan_from_json(read_json(Path("plan.json")))
    assert plan.removed_components
    assert Path("plan.png").stat().st_size > 10_000
    assert hptool(monkeypatch, "plan", "plan.json") == 0
    assert (
        hptool(monkeypatch, "compress", model, *few, "--plan", "plan.json", "--steps", "2", "-o", "small")
        == 0
    )
    student = open_model("small")
    assert student.num_parameters == plan.reached.parameters
    assert student.pipeline.transformer.config["removed_components"]


def test_a_compression_that_was_stopped_goes_on_where_it_was(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = "transformer/diffusion_pytorch_model.safetensors"
    command = ("compress", str(tiny_path), *TINY, "--output")
    assert hptool(monkeypatch, *command, "whole") == 0

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(compress, "save_model", full)
        assert hptool(monkeypatch, *command, "halved") == 2
    assert "cannot write halved: its disk is full" in capsys.readouterr().err
    assert not Path("halved").exists()
    assert Path("halved.work/try-1/checkpoints").exists()
    assert hptool(monkeypatch, *command, "halved") == 0
    assert not Path("halved.work").exists()
    assert (Path("halved") / weights).read_bytes() == (Path("whole") / weights).read_bytes()


def test_the_same_seed_gives_the_same_student(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        assert hptool(monkeypatch, "compress", str(tiny_path), *TINY, "--output", name) == 0
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (Path("a") / weights).read_bytes() == (Path("b") / weights).read_bytes()


@pytest.fixture
def other(tiny_path: Path, tmp_path: Path) -> str:
    """A model that nobody has captions for."""
    model = tmp_path / "other"
    model.mkdir()
    for part in tiny_path.iterdir():
        (model / part.name).symlink_to(part)
    defaults = read_json(model / "generation_defaults.json") | {"world": None}
    (model / "generation_defaults.json").unlink()
    (model / "generation_defaults.json").write_text(json.dumps(defaults))
    return model.name


def test_a_model_of_another_world_needs_prompts(
    other: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hptool(monkeypatch, "compress", other, *TINY) == 2
    assert "--prompts FILE" in capsys.readouterr().err

    Path("prompts.txt").write_text("\n".join(f"a picture of {index} cats" for index in range(40)))
    assert hptool(monkeypatch, "compress", other, *TINY, "--prompts", "prompts.txt", "--json") == 0
    assert [stage["score"] for stage in json.loads(capsys.readouterr().out)["stages"]] == [None] * 3


def test_what_is_chosen_by_hand_is_planned_without_prompts(
    other: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hptool(monkeypatch, "plan", other, "--remove", "2-3") == 0
    assert read_json(Path("other-plan.json"))["removed"] == ["2", "3"]
    capsys.readouterr()
    assert hptool(monkeypatch, "plan", other, "--remove", "2-3", "--strengths", "sgdistill") == 2
    assert "--prompts FILE" in capsys.readouterr().err


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
    sizes = [open_model(str(name)).num_parameters for name in (tiny_path, "once", "twice")]
    assert sizes[1] <= 0.8 * sizes[0]
    assert sizes[2] <= 0.8 * sizes[1]
    assert read_json(Path("twice/plan.json"))["model"] == "once"


def test_a_plan_of_another_model_is_refused(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hptool(monkeypatch, "plan", str(tiny_path), "--remove", "2", "-o", "plan.json") == 0
    assert hptool(monkeypatch, "compress", "shapes", "--plan", "plan.json") == 2
    assert "blocks 6 where the model has 16" in capsys.readouterr().err


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


def test_a_model_held_as_it_is_stored_is_compressed_as_well(
    tiny_flux_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("prompts.txt").write_text("\n".join(f"a picture of {index} cats" for index in range(8)))
    what = ("--remove", "1,3.mlp", "--strengths", "pwp", "--prompts", "prompts.txt", "--num-prompts", "2")
    for name, precision in (("full", "float32"), ("half", "stored")):
        how = (
            "--precision",
            precision,
            "--output",
            name,
            "--steps",
            "3",
            "--per-task",
            "0",
            "--checkpointing",
        )
        assert hptool(monkeypatch, "compress", str(tiny_flux_path), *what, *how) == 0
    errors = [
        read_json(Path(name) / "report.json")["stages"][-1]["velocity_error"] for name in ("full", "half")
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)
    stored = [
        load_file(f"{name}/transformer/diffusion_pytorch_model.safetensors") for name in ("full", "half")
    ]
    assert {item.dtype for part in stored for item in part.values()} == {torch.bfloat16}


def test_a_model_held_in_float16_is_not_trained_in_bfloat16(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("compress", str(tiny_path), "--remove", "3", "--precision", "stored", "--steps", "3")
    assert hptool(monkeypatch, *command, "--per-task", "0") == 2
    assert "open it in float32" in capsys.readouterr().err


@pytest.mark.parametrize("how", [("--cache-prefix",), ("--turn", "2")])
def test_saving_memory_does_not_change_the_student(
    how: tuple[str, ...], tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("compress", str(tiny_path), "--remove", "3,4.ff", "--strengths", "pwp", "--steps", "3")
    weights = "transformer/diffusion_pytorch_model.safetensors"
    for name, options in (("plain", ()), ("saving", how)):
        assert hptool(monkeypatch, *command, "--per-task", "0", "--output", name, *options) == 0
    assert (Path("plain") / weights).read_bytes() == (Path("saving") / weights).read_bytes()
    assert not Path("saving.work").exists()


def test_there_is_nothing_to_cache_where_everything_learns(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (
        "compress",
        str(tiny_path),
        "--remove",
        "3",
        "--steps",
        "3",
        "--cache-prefix",
        "--per-task",
        "0",
    )
    assert hptool(monkeypatch, *command) == 2
    assert "leave cache_prefix out" in capsys.readouterr().err
