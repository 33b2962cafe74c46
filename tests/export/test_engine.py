"""Engines: built where TensorRT-RTX is installed, and refused with the way out where it is not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from deploy.bundle import Bundle
from export.engine import _require_size, build_engine, require_tensorrt_rtx
from export.errors import ExportError


def test_a_missing_tensorrt_rtx_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == "tensorrt_rtx" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(ExportError, match=r"tensorrt_rtx is not installed .*pip install 'hptool\[rtx\]'"):
        require_tensorrt_rtx()


@pytest.mark.parametrize(("engine_bytes", "num_profiles"), [(25_315_500, 1), (48_623_868, 2)])
def test_code_that_outweighs_a_small_models_weights_is_accepted(engine_bytes: int, num_profiles: int) -> None:
    # Measured on twelve blocks of width 128.
    _require_size(
        engine_bytes, weight_bytes=4_073_452, num_nodes=1869, num_profiles=num_profiles, name="model.onnx"
    )


@pytest.mark.parametrize("engine_gigabytes", [1, 12])
def test_an_engine_that_lost_or_expanded_its_weights_is_refused(engine_gigabytes: int) -> None:
    with pytest.raises(ExportError, match="were not taken as stored"):
        _require_size(
            engine_gigabytes * 10**9, weight_bytes=3_740_000_000, num_nodes=6000, num_profiles=1, name="m"
        )


def test_an_engine_holds_a_profile_per_latent_size(bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    engine = tmp_path / "transformer.engine"
    build_engine(
        bundle.file("transformer/model.fp16.onnx"),
        engine,
        compute_capability="8.9",
        latent_sizes=[(8, 8), (4, 16)],
        num_tokens=16,
        max_batch=2,
    )
    assert engine.stat().st_size > bundle.file("engines/rtx4090/transformer.engine").stat().st_size
    assert list(tmp_path.iterdir()) == [engine]


def test_a_gpu_that_tensorrt_rtx_does_not_know_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(ExportError, match=r"compute capability 9\.0"):
        build_engine(
            bundle.file("transformer/model.fp16.onnx"),
            tmp_path / "transformer.engine",
            compute_capability="9.0",
            latent_sizes=[(8, 8)],
            num_tokens=16,
            max_batch=1,
        )
    assert not list(tmp_path.iterdir())
