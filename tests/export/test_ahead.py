"""What another process traces ahead is what an export would trace, and is found by it."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from export import ahead, lower
from export.ahead import traced_ahead
from export.denoiser import lower_transformer
from export.encoders import lower_text_encoder, lower_vae_decoder
from toolchain.families import Model, open_model

PARTS = ["text_encoder", "vae", "transformer"]
NUM_TRACES = 1 + 1 + 3
"""An encoder, the decoder; the transformer without blocks, a block, and the last, which ends the text."""


@pytest.fixture
def fresh(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """Worth tracing ahead, of which nothing was traced."""
    monkeypatch.setenv("HPTOOL_CACHE", str(tmp_path))
    monkeypatch.setattr(ahead, "_WORTH", 0)
    return open_model(str(path), precision="none")  # transformers leaves hooks in an encoder that ran


def wait_for_traces(cache: Path, count: int) -> None:
    while len(list(cache.glob("traces/*.onnx"))) < count:
        time.sleep(0.05)


def test_what_was_traced_ahead_is_not_traced_again(
    fresh: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with traced_ahead(fresh, PARTS, half=False, fused=True):
        wait_for_traces(tmp_path, NUM_TRACES)
    monkeypatch.setattr(lower, "_trace", None)
    lower_text_encoder(fresh.pipeline.text_encoder, fresh.weights("text_encoder"))
    lower_vae_decoder(fresh.pipeline.vae, fresh.weights("vae"))
    lower_transformer(fresh.mmdit, fresh.weights("transformer"), fused_attention=True)


def test_what_is_being_traced_ahead_is_waited_for(
    fresh: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with traced_ahead(fresh, PARTS, half=False, fused=True) as begin:
        wait_for_traces(tmp_path, 1)
        begin("transformer")
    monkeypatch.setattr(lower, "_trace", None)
    lower_transformer(fresh.mmdit, fresh.weights("transformer"), fused_attention=True)


@pytest.mark.timeout(60)
def test_nobody_waits_for_a_process_that_hangs(
    fresh: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(*_: object, **__: object) -> None:
        (tmp_path / "begun").touch()
        time.sleep(3600)

    monkeypatch.setattr(ahead, "_trace", hang)
    monkeypatch.setattr(ahead, "_PATIENCE", 0.1)
    with traced_ahead(fresh, PARTS, half=False, fused=True) as begin:
        while not (tmp_path / "begun").exists():
            time.sleep(0.05)
        begin("transformer")
        assert not multiprocessing.active_children()


@pytest.mark.parametrize(("parts", "worth"), [(PARTS, 10**12), (PARTS[:1], 0)])
def test_for_little_no_process_is_started(
    on_disk: Model, monkeypatch: pytest.MonkeyPatch, parts: list[str], worth: int
) -> None:
    monkeypatch.setattr(ahead, "_WORTH", worth)
    monkeypatch.setattr(ahead.multiprocessing, "get_context", None)
    with traced_ahead(on_disk, parts, half=False, fused=True):
        pass
