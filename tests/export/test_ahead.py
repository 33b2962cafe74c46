"""What another process traces ahead is what an export would trace, and is found by it."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export import ahead, lower, traces
from export.ahead import traced_ahead
from export.components import GraphKind
from export.denoiser import lower_transformer
from export.encoders import lower_text_encoder, lower_vae_decoder
from toolchain.families import Model, open_model

WANTED = (GraphKind(name="model.onnx", fused=True),)
PARTS = ["text_encoder", "vae", "transformer"]
NUM_TRACES = 1 + 1 + 3
"""An encoder, the decoder; the transformer without blocks, a block, and the last, which ends the text."""


@pytest.fixture
def fresh(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """Worth tracing ahead, of which nothing was traced."""
    monkeypatch.setenv("HPTOOL_CACHE", str(tmp_path))
    monkeypatch.setattr(ahead, "_WORTH", 0)
    return open_model(str(path), precision="none")  # transformers leaves hooks in an encoder that ran


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Waits until something is being traced."""
    original = lower._trace

    def told(*args: Any, **options: Any) -> Any:
        (tmp_path / "begun").touch()
        return original(*args, **options)

    monkeypatch.setattr(lower, "_trace", told)
    return lambda: wait_for(tmp_path, "begun", 1)


def wait_for(directory: Path, pattern: str, count: int) -> None:
    while len(list(directory.glob(pattern))) < count:
        time.sleep(0.05)


def test_what_was_traced_ahead_is_not_traced_again(
    fresh: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with traced_ahead(fresh, PARTS, WANTED):
        wait_for(tmp_path, "traces/*.onnx", NUM_TRACES)
    monkeypatch.setattr(lower, "_trace", None)
    lower_text_encoder(fresh.pipeline.text_encoder, fresh.weights("text_encoder"))
    lower_vae_decoder(fresh.pipeline.vae, fresh.weights("vae"))
    lower_transformer(fresh.mmdit, fresh.weights("transformer"), fused=True)


def test_a_trace_that_another_process_is_at_is_waited_for(
    fresh: Model, begun: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with traced_ahead(fresh, ["vae"], WANTED):
        begun()
        monkeypatch.setattr(lower, "_trace", None)
        lower_vae_decoder(fresh.pipeline.vae, fresh.weights("vae"))


@pytest.mark.timeout(60)
def test_a_process_that_hangs_is_not_waited_for(
    fresh: Model, begun: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = lower._trace
    monkeypatch.setattr(traces, "_PATIENCE", 0.1)
    monkeypatch.setattr(lower, "_trace", lambda *args, **options: [told(*args, **options), time.sleep(3600)])
    with traced_ahead(fresh, ["vae"], WANTED):
        begun()
        monkeypatch.setattr(lower, "_trace", told)
        lower_vae_decoder(fresh.pipeline.vae, fresh.weights("vae"))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("parts", "worth"), [(PARTS, 10**12), ([], 0)])
def test_for_little_no_process_is_started(
    on_disk: Model, monkeypatch: pytest.MonkeyPatch, parts: list[str], worth: int
) -> None:
    monkeypatch.setattr(ahead, "_WORTH", worth)
    monkeypatch.setattr(ahead.multiprocessing, "get_context", None)
    with traced_ahead(on_disk, parts, WANTED):
        pass
