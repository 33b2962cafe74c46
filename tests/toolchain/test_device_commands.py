"""`hptool targets` and `hptool doctor`, as typed."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from deploy import machine
from deploy.gpu import Gpu, Gpus
from profiles.page import targets_markdown
from profiles.schema import available_profiles, load_profile
from tests.typed import hptool
from toolchain.cli.exporting import _engine_table


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "studio.toml"
    path.write_text(
        'name = "studio"\ndescription = "Card [1] in the studio"\nextends = "rtx4090"\n'
        "reserved_gib = 4\nbuckets = [[1024, 1024], [832, 1216]]\n"
    )
    return path


def test_targets_are_listed_a_line_each_at_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert hptool(monkeypatch, "targets") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    rows = {words[0]: words for words in lines[2:-2]}
    assert list(rows) == available_profiles()
    assert " ".join(rows["rtx4090"]) == "rtx4090 GeForce RTX 4090, 24 GB 24 8.9 tensorrt-rtx"
    assert rows["cpu-x86"][-3:] == ["8", "-", "openvino"]


def test_targets_are_printed_as_data_and_as_a_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hptool(monkeypatch, "targets", "--json") == 0
    listed = json.loads(capsys.readouterr().out)["targets"]
    assert [entry["name"] for entry in listed] == available_profiles()
    assert hptool(monkeypatch, "targets", "--markdown") == 0
    assert capsys.readouterr().out == targets_markdown()


def test_one_target_is_shown_with_its_sources(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert hptool(monkeypatch, "targets", "show", str(own)) == 0
    shown = capsys.readouterr().out
    assert "Card [1] in the studio" in shown
    assert "(1024, 1024), (832, 1216)" in shown
    assert f"From: {load_profile('rtx4090').sources['bandwidth_gb_s']}" in shown
    assert hptool(monkeypatch, "targets", "show", str(own), "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(asdict(load_profile(str(own)))))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("targets", "show", "rtx409"), "Did you mean rtx4090?"),
        (("targets", "--json", "show", "rtx4090"), "as in show NAME --json"),
        (("targets", "--markdown", "show", "rtx4090"), "as in show NAME --json"),
        (("targets", "--json", "--markdown"), "--json and --markdown are two forms"),
        (("doctor", "--target", "gone.toml"), "Cannot read the device profile gone.toml"),
    ],
)
def test_what_cannot_be_shown_is_one_message(
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert hptool(monkeypatch, *arguments) == 2
    shown = capsys.readouterr()
    assert (shown.out, len(shown.err.splitlines())) == ("", 1)
    assert message in shown.err


def test_the_doctor_judges_every_target_and_those_that_are_named(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hptool(monkeypatch, "doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["target"] for entry in found["targets"]] == available_profiles()
    assert found["machine"]["num_cores"] >= 1
    assert hptool(monkeypatch, "doctor", "--json", "--target", str(own)) == 0
    assert [entry["target"] for entry in json.loads(capsys.readouterr().out)["targets"]] == ["studio"]


def test_the_doctor_shows_what_it_found_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = Gpu(name="NVIDIA H200", compute_capability="9.0", memory_bytes=150_754_820_096)
    gpus = Gpus(devices=(card,), cuda_version="13.0", driver_version="580.65")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(machine, "read_gpus", lambda: gpus)
    monkeypatch.setattr(machine, "_packages", lambda: {"onnxruntime": "1.26.0", "onnxruntime-gpu": "1.26.0"})
    lacking = {"export": (), "edge": (), "edge-gpu": (), "tensorrt": ("tensorrt>=10.8",), "rtx": ()}
    lacking["openvino"] = ("openvino>=2026.2",)
    monkeypatch.setattr(machine, "_missing", lambda: lacking)
    assert hptool(monkeypatch, "doctor", "--target", "h200", "--target", "cpu-x86") == 0
    shown = capsys.readouterr().out
    assert "NVIDIA H200, compute capability 9.0, 150.8 GB" in shown
    assert "580.65, for CUDA 13.0" in shown
    assert "Broken: onnxruntime and onnxruntime-gpu are both installed" in shown
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu" in shown
    rows = [line.split() for line in shown.splitlines() if line.startswith(("h200", "cpu-x86"))]
    assert rows == [["h200", "yes", "no", "onnxruntime-cpu"], ["cpu-x86", "yes", "-", "onnxruntime-cpu"]]
    assert "To do all that this machine can for h200:\n    pip install 'hptool[tensorrt]'\n" in shown


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A device that `shapes` in 4 bits is a little too large for: it lacks 1 MB."""
    from export.fit import ModelSize, fit_target
    from toolchain.families import open_model

    need = fit_target(ModelSize(open_model("shapes", precision="config")), load_profile("rtx4090"), 4).in_turn
    path = tmp_path_factory.mktemp("profiles") / "small.toml"
    path.write_text(
        'name = "small"\ndescription = "A small card"\nextends = "rtx4090"\n'
        f"memory_gib = {(need - 10**6) / 2**30 + 1}\nreserved_gib = 1\n"
    )
    return str(path)


def test_fit_says_by_how_much_and_what_would_have_to_go(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small: str, tmp_path: Path
) -> None:
    assert hptool(monkeypatch, "fit", "-t", small, "-t", "rtx4090", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    first, second = found["targets"]
    assert (first["target"], first["verdict"], first["missing"]) == ("small", "does not fit", 10**6)
    assert first["least_ratio"]["16"] is None
    assert 0 < first["least_ratio"]["4"] < 0.5
    assert second["verdict"] == "fits"
    tiny = tmp_path / "tiny.toml"
    tiny.write_text('name = "tiny"\ndescription = "Too small"\nextends = "rtx4090"\nmemory_gib = 1.1\n')
    monkeypatch.setenv("COLUMNS", "80")
    assert hptool(monkeypatch, "fit", "-t", small, "-t", str(tiny), "-t", "jetson-agx-orin-64gb") == 0
    out = capsys.readouterr().out
    assert "…" not in out
    verdict, ratios = (line.split() for line in out.splitlines() if line.startswith("small "))
    assert verdict[-4:] == ["too", "large:", "1.0", "MB"]
    assert ratios[1:4] == ["no", "no", f"{first['least_ratio']['4']:.0%}"]
    assert "Step: an estimate" in out
    assert "tiny cannot hold it: in 4 bits and without half of the transformer it still takes 50" in out
    assert "small cannot hold it" not in out


def test_compress_takes_its_ratio_from_a_target(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small: str, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--rule", "koala", "--num-prompts", "2", "--steps", "0", "--per-task", "0", "--json"]
    assert hptool(monkeypatch, "compress", "--target", small, "-o", "student", *options) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert hptool(monkeypatch, "fit", "student", "-t", small, "--json") == 0
    assert json.loads(capsys.readouterr().out)["targets"][0]["missing"] == 0
    assert outcome["ratio_reached"] < 0.5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit", "--bits", "5"], "--bits is 4, 8 or 16, not 5"),
        (["fit", "nobody-has-this"], "there is no model 'nobody-has-this'"),
        (["fit", "-t", "rtx4091"], "Did you mean"),
        (["fit", "--remove", "99"], "there is no block 99"),
        (["compress", "--target", "rtx4090", "-o", "x"], "shapes fits on rtx4090 as it is"),
        (["compress", "--target", "rtx4090", "--ratio", "0.2", "-o", "x"], "takes no other limit"),
    ],
)
def test_a_mistake_is_one_message(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hptool(monkeypatch, *arguments) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_place_of_an_engine_is_never_cut_short() -> None:
    path = "engines/sm86-sm89-sm120-f0d22087.engine"
    facts = {"compute_capabilities": ["8.6", "8.9", "12.0"], "bytes": 34_578_000, "num_found": 221}
    engine = {"targets": ["rtx3060-12gb", "rtx4090", "rtx5090"], "num_int4": 221, "path": path} | facts
    shown = io.StringIO()
    Console(width=80, file=shown).print(_engine_table([engine]))
    places = [line.split("│")[5].strip() for line in shown.getvalue().splitlines() if line.startswith("│")]
    assert "".join(places) == path
