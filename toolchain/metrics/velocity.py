"""The default metric: how far the velocity goes wrong."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from toolchain.metrics import StateMetric


@dataclass(frozen=True, kw_only=True)
class Velocity(StateMetric):
    """|v - v_teacher|² / |v_teacher|², which needs no picture and compares states of all timesteps."""

    name = "velocity"

    def errors(self, predicted_BCHW: torch.Tensor, teacher_BCHW: torch.Tensor) -> torch.Tensor:
        """See `StateMetric`."""
        teacher = teacher_BCHW.flatten(1).float()
        return (predicted_BCHW.flatten(1).float() - teacher).square().sum(1) / teacher.square().sum(1)
