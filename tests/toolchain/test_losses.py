"""Losses are means over a tensor and sums over tensors, and say so in numbers."""

from __future__ import annotations

import math

import pytest
import torch

from toolchain.errors import ToolchainError
from toolchain.losses import LossWeights, feature_loss, output_loss

ONE, THREE = torch.ones(2, 3), torch.full((2, 3), 3.0)
LARGE_STUDENT, LARGE_TEACHER = torch.full((4,), 80.0), torch.full((4,), 100.0)


def test_the_output_counts_as_its_mean_squared_error() -> None:
    assert output_loss(ONE, THREE) == 4.0


def test_features_count_as_the_sum_of_their_mean_squared_errors() -> None:
    assert feature_loss([(ONE, THREE), (LARGE_STUDENT, LARGE_TEACHER)]) == 4.0 + 400.0


def test_normalised_features_count_relative_to_the_teachers() -> None:
    loss = feature_loss([(ONE, THREE), (LARGE_STUDENT, LARGE_TEACHER)], normalised=True)
    torch.testing.assert_close(loss, torch.tensor(4 / 9 + 400 / 10_000))


def test_normalising_by_a_feature_of_zeros_leaves_the_error_as_it_is() -> None:
    assert feature_loss([(THREE, 0 * ONE)], normalised=True) == 9.0


def test_16_bit_features_are_compared_in_32_bits() -> None:
    # 300 squared is more than float16 holds.
    student, teacher = torch.zeros(2, dtype=torch.float16), torch.full((2,), 300.0, dtype=torch.float16)
    assert feature_loss([(student, teacher)]) == 90_000.0
    assert output_loss(student, teacher).dtype == torch.float32


def test_only_the_student_gets_a_gradient() -> None:
    student, teacher = ONE.clone().requires_grad_(), THREE.clone().requires_grad_()
    feature_loss([(student, teacher)], normalised=True).backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, torch.full((2, 3), 2 * (1 - 3) / 6 / 9))


def test_features_of_two_shapes_are_not_broadcast() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 1\)"):
        feature_loss([(ONE, ONE[:, :1])])


def test_no_features_are_no_loss() -> None:
    with pytest.raises(ValueError, match="no features"):
        feature_loss([])


@pytest.mark.parametrize(
    "weights", [{"output": 0.0, "features": 0.0}, {"output": -1.0}, {"features": math.nan}]
)
def test_weights_that_teach_nothing_or_nonsense_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ToolchainError, match="weights are at least 0, and one is above"):
        LossWeights(**weights)
