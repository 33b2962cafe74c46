"""What a training is fed with: states, a batch a step, from numbers alone."""

from __future__ import annotations

from typing import Protocol

import torch

from toolchain.families.mmdit import TextStates


class Feed(Protocol):
    """States to teach in, in memory or on disk.

    A batch follows from the seed and the step's number, so that a run can stop and go on. Its rows can be
    shared out among processes: what `batch` gives of a row does not depend on the others.
    """

    @property
    def fixed(self) -> bool:
        """Whether a row is the same state whenever it comes up."""

    def __len__(self) -> int:
        """How many there are to draw from."""

    def digest(self) -> str:
        """Of all there is to learn from, for what must not go on with anything else."""

    def rows(self, seed: int, step: int, size: int) -> torch.Tensor:
        """Those of a step's batch, int64, all of one latent size."""

    def batch(
        self, rows: torch.Tensor, draw: tuple[int, int] = (0, 0)
    ) -> tuple[torch.Tensor, torch.Tensor, TextStates, torch.Tensor | None]:
        """Latents, timesteps, text, and the teacher's velocities where they are known.

        Args:
            rows: Of one step.
            draw: The seed and the step, where noise is drawn anew for each.
        """
