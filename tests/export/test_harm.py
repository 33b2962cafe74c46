"""What rounding does to the velocity: near what is measured by rounding, and without a trace in the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from export.bits import Weight
from export.calibrate import Moments, collect_moments
from export.errors import ExportError
from export.harm import component_of_weights, rounding_harms, weight_bits
from export.rounding import dequantize, quantize_matrix
from toolchain.analysis import velocity_errors
from toolchain.families import Model
from toolchain.geometry import Unit
from toolchain.trajectories import States, sample_states

PROMPTS = ["a red circle", "a blue square", "two green circles", "a yellow triangle"]


@pytest.fixture(scope="module")
def quick(model: Model) -> Model:
    return replace(model, defaults=replace(model.defaults, num_inference_steps=4))


@pytest.fixture(scope="module")
def moments(quick: Model, tmp_path_factory: pytest.TempPathFactory) -> Moments:
    return collect_moments(quick, PROMPTS, tmp_path_factory.mktemp("moments") / "moments.safetensors")


@pytest.fixture(scope="module")
def states(quick: Model) -> States:
    return sample_states(quick, PROMPTS, seed=0)


@pytest.fixture(scope="module")
def harms(quick: Model, moments: Moments, states: States) -> Sequence[Weight]:
    return rounding_harms(quick, moments, states, group_size=64)


def measured(model: Model, moments: Moments, states: States, name: str, bits: int) -> float:
    """The velocity error with one weight rounded."""
    parameter = model.pipeline.transformer.get_parameter(name)
    kept = parameter.detach().clone()
    found = quantize_matrix(kept.numpy().T, bits=bits, group_size=64, importance=moments.importance(name))  # type: ignore[arg-type]
    try:
        parameter.data = torch.from_numpy(np.ascontiguousarray(dequantize(found.values, found.scales).T))
        return float(velocity_errors(model.mmdit, states).mean())
    finally:
        parameter.data = kept


def test_the_estimate_is_near_the_error_of_rounding_one_weight(
    quick: Model, moments: Moments, states: States, harms: Sequence[Weight]
) -> None:
    worst = sorted(harms, key=lambda weight: -weight.error4)[:4]
    for weight in worst:
        for bits, estimate in ((4, weight.error4), (8, weight.error8)):
            exact = measured(quick, moments, states, weight.name, bits)
            assert exact / 3 < estimate < exact * 3, (weight.name, bits)


def test_the_bytes_are_those_of_values_and_scales(harms: Sequence[Weight]) -> None:
    found = next(weight for weight in harms if weight.name == "transformer_blocks.0.ff.net.0.proj.weight")
    size = 64 * 256
    assert (found.bytes4, found.bytes8, found.bytes16) == (size // 2 + 512, size + 512, 2 * size)


def test_the_model_is_left_as_it_was(quick: Model, harms: Sequence[Weight]) -> None:
    assert harms
    for parameter in quick.pipeline.transformer.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad


def test_states_are_needed(quick: Model, moments: Moments, states: States) -> None:
    with pytest.raises(ExportError, match="there are none"):
        rounding_harms(quick, moments, states, num_states=0)


def test_every_linear_of_the_blocks_belongs_to_its_component(quick: Model) -> None:
    found = component_of_weights(quick.mmdit)
    linears = {
        f"{name}.weight"
        for name, part in quick.pipeline.transformer.named_modules()
        if name.startswith("transformer_blocks.") and isinstance(part, torch.nn.Linear)
    }
    assert found.keys() == linears
    assert found["transformer_blocks.1.ff.net.2.weight"] == "1.ff"
    assert found["transformer_blocks.0.norm1.linear.weight"] == "0.norm1"


def test_components_of_a_student_are_known_by_its_own_numbers(quick: Model) -> None:
    student = quick.mmdit.without([Unit.parse("0.ff"), Unit.parse("1.attn")], "zero")
    found = component_of_weights(student)
    assert "0.ff" not in found.values()
    assert found["transformer_blocks.0.attn.to_q.weight"] == "0.attn"


def test_bits_of_components_become_bits_of_weights(quick: Model) -> None:
    assert weight_bits(quick.mmdit, {"1.ff": 8}) == {
        "transformer_blocks.1.ff.net.0.proj.weight": 8,
        "transformer_blocks.1.ff.net.2.weight": 8,
    }
    with pytest.raises(ExportError, match=r"bits are given for 7\.ff, which no linear"):
        weight_bits(quick.mmdit, {"7.ff": 8})
