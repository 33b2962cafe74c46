"""`hptool precompute`, and `hptool compress` on what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.toolchain.data.conftest import folder, picture
from tests.typed import hptool
from toolchain import compress
from toolchain.families import open_model


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def pictures(here: Path) -> str:
    files = {f"{n}.png": picture("red", (8 + n, 8)) for n in range(8)}
    folder(here / "set", {**files, "broken.png": b"junk"}, {name: f"a {name}" for name in files})
    return "set"


def test_data_on_disk_is_not_asked_to_fit_into_memory(
    tiny_path: Path, pictures: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hptool(monkeypatch, "precompute", str(tiny_path), pictures, "-o", "data") == 0
    Path("prompts.txt").write_text("".join(f"a red circle {number}\n" for number in range(8)))
    monkeypatch.setattr(compress.psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    options = ("--num-prompts", "2", "--steps", "1", "--per-task", "0", "--prompts", "prompts.txt")
    assert hptool(monkeypatch, "compress", str(tiny_path), *options, "-o", "one") == 2
    assert hptool(monkeypatch, "compress", str(tiny_path), *options, "--data", "data", "-o", "two") == 0


@pytest.mark.parametrize("family", ["tiny_path", "tiny_flux_path"])
def test_compress_on_data_needs_neither_autoencoder_nor_text_encoders(
    family: str,
    pictures: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And its student has them, as they were on disk."""
    model = str(request.getfixturevalue(family))
    assert hptool(monkeypatch, "precompute", model, pictures, "-o", "data", "--json") == 0
    index = json.loads(capsys.readouterr().out)
    assert index["skipped"] == [
        {"key": "broken.png", "reason": "it has no caption: neither a row of metadata nor broken.txt"}
    ]

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a part besides the transformer ran")

    view = open_model(model, precision="config").mmdit
    options = ("--data", "data", "--num-prompts", "3", "--steps", "3", "--per-task", "0", "--json")
    with monkeypatch.context() as patch:
        patch.setattr(type(view), "encode_prompts", forbidden)
        assert hptool(monkeypatch, "compress", model, *options, "-o", "student") == 0
    outcome = json.loads(capsys.readouterr().out)
    assert [stage["name"] for stage in outcome["stages"]] == ["original", "pruned", "distilled"]
    student, teacher = open_model("student"), open_model(model)
    for part in ("vae", "text_encoder", "text_encoder_2"):
        theirs = teacher.weights(part)
        assert all(torch.equal(item, theirs[name]) for name, item in student.weights(part).items()), part
    before = load_file(Path(model) / "vae" / "diffusion_pytorch_model.safetensors")
    after = load_file(Path("student") / "vae" / "diffusion_pytorch_model.safetensors")
    assert {item.dtype for item in after.values()} == {item.dtype for item in before.values()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("precompute", "shapes", "nosuch", "-o", "out"), "nosuch is no data set: it does not exist"),
        (("precompute", "shapes", "set", "-o", "set"), "output set is not empty"),
        (("compress", "shapes", "--data", "set"), "hptool precompute MODEL set"),
        (("compress", "shapes", "--data", "nosuch"), "nosuch is no precomputed data set"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    arguments: tuple[str, ...],
    message: str,
    pictures: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert hptool(monkeypatch, *arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1
    assert [path.name for path in Path().iterdir()] == ["set"]


def test_captions_that_do_not_suffice_to_measure_on_say_so(
    tiny_path: Path, pictures: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_path)
    assert hptool(monkeypatch, "precompute", model, pictures, "-o", "data") == 0
    assert "Skipped 1, all listed in data/index.json" in capsys.readouterr().out
    assert hptool(monkeypatch, "compress", model, "--data", "data") == 2
    assert "data holds 8 captions; at least 32 are needed" in capsys.readouterr().err
