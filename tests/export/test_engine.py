"""Engines: built where TensorRT-RTX is installed, and refused with the way out where it is not."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from deploy import choice, session
from deploy import engine as engine_module
from deploy.bundle import Bundle, Shapes, Variant
from deploy.engine import Engine, EngineRequest
from deploy.session import open_variant
from export.bundle import export_bundle
from export.cache import ComponentCache
from export.engine import _groups, _require_size, num_engines, require_tensorrt_rtx
from export.errors import ExportError
from profiles.schema import Profile, load_profile
from toolchain.families import Model

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the extra `rtx`"
)


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


def report(bundle: Bundle) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(bundle.file("engines.json").read_text())["engines"]
    return rows


@needs_rtx
def test_targets_that_agree_share_one_engine(bundle: Bundle) -> None:
    engines = [variant for variant in bundle.manifest.variants if variant.runtime == "tensorrt-rtx"]
    assert [engine.target for engine in engines] == ["rtx3060-12gb", "rtx4090", "rtx5090"]
    assert len({engine.path for engine in engines}) == 1
    # The target's own first, so that a machine recognises what was made for it.
    assert [engine.compute_capabilities for engine in engines] == [
        ["8.6", "8.9", "12.0"],
        ["8.9", "8.6", "12.0"],
        ["12.0", "8.6", "8.9"],
    ]
    # Batches differ: the engine takes the largest, and each target its own.
    assert [engine.shapes.max_batch for engine in engines if engine.shapes] == [2, 4, 4]
    shared, _ = report(bundle)
    assert shared["targets"] == [engine.target for engine in engines]
    assert shared["compute_capabilities"] == ["8.6", "8.9", "12.0"]
    assert (shared["path"], shared["bytes"]) == (engines[0].path, bundle.file(engines[0].path).stat().st_size)


@needs_rtx
def test_the_report_says_what_is_in_an_engine(bundle: Bundle) -> None:
    shared, _ = report(bundle)
    # Those of AdaLN are so narrow here that the builder lays them down in yet another way.
    assert shared["num_int4"] == 25
    assert 20 <= shared["num_found"] <= 25
    assert shared["builder"].startswith("tensorrt-rtx ")


def test_an_engine_that_its_device_builds_is_promised_as_such(bundle: Bundle) -> None:
    row = report(bundle)[-1]
    assert (row["targets"], row["runtime"]) == (["h100"], "tensorrt")
    assert (row["path"], row["bytes"], row["builder"]) == (None, None, None)
    (h100,) = (variant for variant in bundle.manifest.variants if variant.runtime == "tensorrt")
    assert (h100.path, h100.compute_capabilities) == ("transformer/model.fp16.onnx", ["9.0"])


@pytest.mark.usefixtures("tensorrt")
def test_an_engine_of_this_machines_gpu_is_built_into_its_cache(
    on_disk: Model, cache: ComponentCache, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "gpu_compute_capability", lambda: "9.0")
    made = export_bundle(on_disk, targets=[load_profile("h100")], output=tmp_path / "bundle", cache=cache)
    assert not list(made.path.glob("engines/*"))
    (row,) = report(made)
    assert row["builder"] == "tensorrt 10.16.0"
    assert row["num_int4"] == 25
    opened: list[Path] = []
    monkeypatch.setattr(session, "EngineSession", lambda path, _: opened.append(path))
    monkeypatch.setattr(engine_module, "build_engine", pytest.fail)
    open_variant(made, made.manifest.variants[0], cache=cache.path)
    assert opened[0].stat().st_size == row["bytes"]


@needs_rtx
def test_an_engine_is_built_once_for_the_same_and_again_for_another_option(
    on_disk: Model,
    gpus: list[Profile],
    cache: ComponentCache,
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[EngineRequest] = []

    def build(request: EngineRequest, engine: Path, *_: Any) -> Engine:
        asked.append(request)
        engine.write_bytes(bytes(8))
        digest = hashlib.sha256(bytes(8)).hexdigest()
        return Engine(bytes=8, sha256=digest, num_int4=0, builder="none", seconds=0.0)

    monkeypatch.setattr(engine_module, "build_engine", build)
    again = export_bundle(on_disk, targets=gpus, output=tmp_path / "again", cache=cache)
    assert not asked
    assert again.manifest.files.keys() == bundle.manifest.files.keys()
    larger = dataclasses.replace(gpus[1], buckets=((64, 64), (32, 128)))
    with pytest.raises(ExportError, match="was given 0 weights of 4 bits to expand where"):
        export_bundle(on_disk, targets=[larger], output=tmp_path / "larger", cache=cache)
    assert [request.latent_sizes for request in asked] == [((8, 8), (4, 16))]
    assert not (tmp_path / "larger").exists()


@pytest.mark.parametrize(
    ("capabilities", "batches", "sizes", "groups"),
    [
        (["8.6", "8.9", "12.0"], [1, 2, 4], [(64, 64)] * 3, [[0, 1, 2]]),
        (["7.5", "8.9", "7.5"], [1, 1, 1], [(64, 64)] * 3, [[0, 2], [1]]),
        (["8.6", "8.9", "8.6"], [1, 1, 1], [(64, 64), (64, 64), (32, 32)], [[0, 1], [2]]),
    ],
)
def test_turing_and_other_sizes_are_built_apart(
    capabilities: list[str], batches: list[int], sizes: list[tuple[int, int]], groups: list[list[int]]
) -> None:
    variants = [
        Variant(
            target=f"target{index}",
            runtime="tensorrt-rtx",
            path="transformer/model.fp16.onnx",
            activations="float16",
            compute_capabilities=[capability],
            shapes=Shapes(sizes=[size], max_batch=batch, text_tokens=16),
        )
        for index, (capability, batch, size) in enumerate(zip(capabilities, batches, sizes, strict=True))
    ]
    assert _groups(variants) == groups
    assert num_engines(variants) == len(groups)
