"""What the inputs of linears look like: their mean squares, gathered once, for one model alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from export.calibrate import Moments, collect_moments, read_moments, weights_digest
from export.errors import ExportError
from toolchain.families import Model

PROMPTS = ["a red circle", "a blue square", "two green circles"]
NAME = "transformer_blocks.0.ff.net.0.proj"
STEPS = 2


@pytest.fixture
def quick(model: Model) -> Model:
    return replace(model, defaults=replace(model.defaults, num_inference_steps=STEPS))


class StoppedError(Exception):
    pass


def stop_after(steps: int) -> Callable[[], None]:
    """Make a callback that ends a run."""
    left = [steps]

    def on_step() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise StoppedError

    return on_step


def assert_same(found: Moments, expected: Moments) -> None:
    assert found.counts == expected.counts
    assert found.sums.keys() == expected.sums.keys()
    for name, value in expected.sums.items():
        np.testing.assert_array_equal(found.sums[name], value)


def test_importance_is_the_mean_square_of_each_input_over_all_sampling(quick: Model, tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []
    linear = quick.pipeline.transformer.get_submodule(NAME)
    with linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1))):
        moments = collect_moments(quick, PROMPTS, tmp_path / "moments.safetensors", batch_size=2)
    rows = torch.cat(seen)
    assert moments.counts[f"{NAME}.weight"] == len(rows) == len(PROMPTS) * STEPS * 2 * 16
    np.testing.assert_allclose(moments.importance(f"{NAME}.weight"), rows.square().mean(0), rtol=1e-5)


def test_every_linear_of_the_blocks_is_seen_and_nothing_is_left_in_the_model(
    quick: Model, tmp_path: Path
) -> None:
    moments = collect_moments(quick, PROMPTS[:1], tmp_path / "moments.safetensors")
    transformer = quick.pipeline.transformer
    linears = {
        f"{name}.weight"
        for name, part in transformer.named_modules()
        if name.startswith("transformer_blocks.") and isinstance(part, torch.nn.Linear)
    }
    assert linears <= moments.counts.keys() <= transformer.state_dict().keys()
    assert not any(part._forward_pre_hooks for part in transformer.modules())


def test_a_stopped_run_goes_on_with_the_missing_batches(quick: Model, tmp_path: Path) -> None:
    whole = collect_moments(quick, PROMPTS, tmp_path / "whole.safetensors", batch_size=1)
    path, steps = tmp_path / "stopped.safetensors", list[None]()
    with pytest.raises(StoppedError):
        collect_moments(quick, PROMPTS, path, batch_size=1, on_step=stop_after(STEPS + 1))
    resumed = collect_moments(quick, PROMPTS, path, batch_size=1, on_step=lambda: steps.append(None))
    assert len(steps) == 2 * STEPS
    assert_same(resumed, whole)
    assert_same(read_moments(path), whole)


def test_moments_that_are_there_are_not_gathered_again(quick: Model, tmp_path: Path) -> None:
    path = tmp_path / "moments.safetensors"
    first = collect_moments(quick, PROMPTS[:1], path)
    assert_same(collect_moments(quick, PROMPTS[:1], path, on_step=stop_after(0)), first)


def test_moments_of_other_weights_or_prompts_are_refused(quick: Model, tmp_path: Path) -> None:
    path = tmp_path / "moments.safetensors"
    collect_moments(quick, PROMPTS[:1], path)
    with pytest.raises(ExportError, match=r"another num_prompts \(1, not 2\), another prompts_sha256"):
        collect_moments(quick, PROMPTS[:2], path)
    transformer = copy.deepcopy(quick.pipeline.transformer)
    with torch.no_grad():
        transformer.proj_out.bias[0] += 1
    parts = {**quick.pipeline.components, "transformer": transformer}
    other = replace(quick, pipeline=type(quick.pipeline)(**parts))
    with pytest.raises(ExportError, match=r"another weights .*; name another file, or remove it"):
        collect_moments(other, PROMPTS[:1], path)


def test_a_linear_that_was_not_seen_has_no_importance() -> None:
    with pytest.raises(ExportError, match=r"no input of 'a\.weight' was seen"):
        Moments(sums={}, counts={}, batches=1, settings={}).importance("a.weight")


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"schema_version": "2", "kind": "moments"},
        {"schema_version": "1", "kind": "moments"},
        {"schema_version": "1", "kind": "moments", "batches": "1", "settings": "{}", "counts": "{}"},
        {"schema_version": "1", "kind": "moments", "batches": "1", "settings": "{}", "counts": "{"},
    ],
)
def test_a_file_that_holds_no_moments_is_refused(tmp_path: Path, metadata: dict[str, str]) -> None:
    path = tmp_path / "moments.safetensors"
    save_file({"a.weight": np.ones(2)}, path, metadata)
    with pytest.raises(ExportError, match="remove it to calibrate anew"):
        read_moments(path)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "moments.safetensors"
    path.write_bytes(json.dumps({"a": 1}).encode())
    with pytest.raises(ExportError, match="cannot be read as moments"):
        read_moments(path)


def test_a_digest_sees_names_and_values_whatever_they_are_held_in() -> None:
    one = {"weight": torch.tensor([[1.0, 2.0]])}
    assert weights_digest(one) == weights_digest({"weight": one["weight"].bfloat16()})
    others = ({"bias": one["weight"]}, {"weight": one["weight"].T}, {"weight": one["weight"] + 1})
    assert len({weights_digest(item) for item in (one, *others)}) == 4
