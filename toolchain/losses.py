"""What a student is taught by: pure functions of tensors.

Means are taken over all elements of one tensor, sums over tensors; everything is computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from toolchain.errors import ToolchainError


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """How much each thing that is taught counts; 0 leaves it out, and what only it needs is not computed."""

    output: float = 1.0
    """The velocity."""
    features: float = 1e-4
    """What each of the surviving blocks gives, image and text; the default is the official recipe's, for
    features as they are."""
    normalised: bool = False
    """Whether each feature's error is divided by the mean square of the teacher's, so that blocks count the
    same whatever the size of their activations, which grows with depth."""

    def __post_init__(self) -> None:
        weights = (self.output, self.features)
        if not all(0 <= value < math.inf for value in weights) or not any(weights):
            raise ToolchainError(
                f"the loss weighs the output {self.output} and features {self.features}; "
                "weights are at least 0, and one is above"
            )


def output_loss(predicted_BCHW: torch.Tensor, target_BCHW: torch.Tensor) -> torch.Tensor:
    """Mean squared error of a velocity."""
    return F.mse_loss(predicted_BCHW.float(), target_BCHW.float())


def feature_loss(
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], *, normalised: bool = False
) -> torch.Tensor:
    """Sum of the mean squared errors of pairs of a student's and a teacher's feature.

    Args:
        pairs: At least one; the two of a pair are of one shape, and no gradient reaches the teacher's.
        normalised: Divide each error by the mean square of the teacher's feature.

    Raises:
        ValueError: There is no pair, or one is of two shapes.
    """
    terms = []
    for student, teacher in pairs:
        if student.shape != teacher.shape:
            raise ValueError(f"features of shapes {tuple(student.shape)} and {tuple(teacher.shape)}")
        wanted = teacher.detach().float()
        error = F.mse_loss(student.float(), wanted)
        # A teacher's feature of zeros, which only an untrained model has, leaves the error as it is.
        size = wanted.square().mean() if normalised else wanted.new_ones(())
        terms.append(error / torch.where(size > 0, size, 1.0))
    if not terms:
        raise ValueError("there are no features to compare")
    return torch.stack(terms).sum()
