"""What a report measures itself, and what it says of what it cannot measure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from report.evidence import read_evidence
from report.measure import SEED, measure
from tests.typed import hptool
from toolchain.families import open_model
from toolchain.progress import silent


def test_every_stage_paints_the_same_prompts_from_the_same_noise(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ("--steps", "1", "--per-task", "1", "--ratio", "0.2", "--num-prompts", "2", "-o", "student")
    assert hptool(monkeypatch, "compress", str(tiny_path), *small) == 0
    found = measure(read_evidence([Path("student")]), prompts=None, targets=(), paint=True, bar=silent)
    assert found.notes == []
    assert list(found.pictures) == list(found.steps_ms) == ["original", "pruned", "distilled"]
    model = open_model(str(tiny_path))
    noise = np.random.default_rng(SEED).standard_normal(
        (len(found.prompts), *model.latent_shape), dtype=np.float32
    )
    np.testing.assert_array_equal(found.pictures["original"], model.paint(found.prompts, noise))


def test_a_teacher_that_is_gone_is_noted_and_the_page_is_written(
    student: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    assert hptool(monkeypatch, "report", str(student), "--measure", "-o", str(page)) == 0
    told = capsys.readouterr().out
    assert "Pictures of original could not be had: there is no directory" in told
    assert "The memory of devices could not be had" in told
    assert "Pictures of original could not be had" in page.read_text(encoding="utf-8")


def test_a_directory_that_is_neither_ends_in_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hptool(monkeypatch, "report", str(tmp_path), "-o", str(tmp_path / "r.html")) == 2
    assert "is neither a student nor a bundle" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()
