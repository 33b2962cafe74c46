"""What is measured on a GPU, in small and without one: each row once, and the page of all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu_distill, gpu_speed
from benchmarks.synthetic import STUDENTS
from toolchain.artifacts import read_json


@pytest.mark.parametrize("name", ["tiny-sd3.5", "tiny-flux"])
def test_a_step_is_timed_with_all_blocks_and_without_some(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for whole in (True, False):
        gpu_speed.in_torch(name, device="cpu", whole=whole)
        found = json.loads(capsys.readouterr().out)
        assert found["seconds_per_step"] > 0
        assert found["gpu_bytes"] == 0, "there is no GPU to ask"
    student = STUDENTS[name]
    views = [gpu_speed._view(student, gpu_speed.torch.device("cpu"), gone) for gone in ((), student.removed)]
    assert len(views[0].blocks) - len(views[1].blocks) == len(student.removed)


def test_what_is_measured_already_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def ask(*arguments: str) -> dict[str, float]:
        asked.append(arguments[0])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {"seconds_per_step": 1.0, "gpu_bytes": 0}

    monkeypatch.setattr(gpu_speed, "_ask", ask)
    monkeypatch.setattr(gpu_speed, "_bundle", lambda name, scratch, device: scratch / name)
    run = {"scratch": tmp_path, "device": "cpu", "small": True, "output": tmp_path / "found.json"}
    with pytest.raises(KeyboardInterrupt):
        gpu_speed.measure(**run)  # type: ignore[arg-type]
    gpu_speed.measure(**run)  # type: ignore[arg-type]
    each = ["in-torch"] * 4 + ["in-bundle"]
    assert asked == ["in-torch"] * 3 + each[2:] + each + ["in-decoder"]
    assert len(read_json(tmp_path / "found.json")["rows"]) == 2 * len(each) + 1


def test_the_page_is_of_what_was_measured() -> None:
    found, distilled = (read_json(path) for path in (gpu_speed.RESULTS, gpu_distill.RESULTS))
    page = gpu_speed.page(found, distilled)
    assert page == gpu_speed.PAGE.read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| SD3.5-Large-Turbo: original, bfloat16")]
    assert "| 1.00 |" in rows[0]
    found["rows"]["FLUX.1-schnell: pruned, INT4, onnxruntime"] = {"failed": 1}
    assert "| FLUX.1-schnell: pruned, INT4, onnxruntime | failed |" in gpu_speed.page(found, distilled)
