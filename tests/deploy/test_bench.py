"""`hptool bench` measures what a picture took, and nothing else."""

from __future__ import annotations

import pytest

from deploy.bench import run_bench
from deploy.errors import DeployError
from tests.deploy.conftest import MakeBundle


def test_each_part_of_each_picture_but_the_first_is_counted(make_bundle: MakeBundle) -> None:
    pictures: list[int] = []
    found = run_bench(
        make_bundle(), prompt="a cab", steps=3, repeats=4, on_picture=lambda: pictures.append(1)
    )
    assert len(pictures) == 5
    assert (found.target, found.runtime, found.steps, found.repeats) == ("cpu-x86", "onnxruntime-cpu", 3, 4)
    assert set(found.parts_ms) == {"text_encoders", "transformer", "vae_decoder", "total", "step"}
    for spread in found.parts_ms.values():
        assert 0 < spread.fewest <= spread.p50 <= spread.p95
    parts = found.parts_ms
    assert parts["step"].fewest <= parts["transformer"].p50 / 3
    assert parts["transformer"].fewest + parts["vae_decoder"].fewest <= parts["total"].p95
    assert found.cold_ms > parts["total"].fewest
    assert found.peak_bytes is not None
    assert found.peak_bytes > 1 << 20


def test_text_is_encoded_anew_for_each_picture(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deploy.pipeline import EdgePipeline

    encoded: list[str] = []
    encode = EdgePipeline._encode_together

    def noted(self: EdgePipeline, prompts: list[str]) -> object:
        encoded.extend(prompt for prompt in prompts if prompt)
        return encode(self, prompts)

    monkeypatch.setattr(EdgePipeline, "_encode_together", noted)
    run_bench(make_bundle(), prompt="a cab", steps=1, repeats=2)
    assert len(encoded) == len(set(encoded)) == 3


def test_no_pictures_are_refused(make_bundle: MakeBundle) -> None:
    with pytest.raises(DeployError, match="repeats must be 1 at least"):
        run_bench(make_bundle(), repeats=0)
