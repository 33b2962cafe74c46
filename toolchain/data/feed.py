"""What a training is fed with: states, a batch a step, from numbers alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np
import torch

from toolchain.data.shards import Precomputed
from toolchain.errors import ToolchainError
from toolchain.families.mmdit import TextStates
from toolchain.families.view import Model
from toolchain.prefix import digest


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


_EMPTY_SHARE = 0.1
"""Of captions that are left out, where guidance compares with the empty one; as models are trained."""


def open_feed(data: Precomputed, model: Model, *, without: Collection[str] = ()) -> Feed:
    """What a precomputed data set has to teach.

    Args:
        data: Of pictures or of prompts.
        model: The teacher.
        without: Captions that are not to be taught.

    Raises:
        ToolchainError: It was made with another model, or nothing is left.
    """
    data.check(model)
    held_out = torch.tensor([row for name, row in data.texts.rows.items() if name in without])
    feed: Feed
    if data.index.facts.kind == "latents":
        feed = _Pictures(data, model, held_out)
    else:
        feed = _Painted(data, held_out)
    if not len(feed):
        raise ToolchainError(
            f"{data.directory} holds nothing but the captions that the student is judged on; precompute "
            "more, or give other prompts to judge on: --prompts FILE"
        )
    return feed


class _Painted:
    """States of the teacher's own sampling, from disk."""

    fixed = True

    def __init__(self, data: Precomputed, held_out: torch.Tensor) -> None:
        self._data, self._columns = data, data.tensors("states")
        self._captions = self._columns["captions"].whole()
        self._rows = torch.nonzero(~torch.isin(self._columns["prompts"].whole(), held_out))[:, 0]

    def __len__(self) -> int:
        return len(self._rows)

    def digest(self) -> str:
        return digest([self._rows]) + self._data.digest()

    def rows(self, seed: int, step: int, size: int) -> torch.Tensor:
        rng = np.random.default_rng((seed, step))
        return torch.from_numpy(rng.choice(len(self), size=min(size, len(self)), replace=False))

    def batch(
        self, rows: torch.Tensor, draw: tuple[int, int] = (0, 0)
    ) -> tuple[torch.Tensor, torch.Tensor, TextStates, torch.Tensor]:
        own = self._rows[rows]
        latents, timesteps, velocities = (
            self._columns[name][own].float() for name in ("latents", "timesteps", "velocities")
        )
        return latents, timesteps, self._data.texts.index(self._captions[own]), velocities


class _Pictures:
    """Pictures with noise drawn for each whenever it comes up, which the teacher has to be asked about.

    A row is a pair of a picture and a caption; where a size has fewer pairs than a batch, some come up more
    than once, as rows of higher numbers and with other noise.
    """

    fixed = False

    def __init__(self, data: Precomputed, model: Model, held_out: torch.Tensor) -> None:
        pairs, self._latents = data.pairs()
        self._data, self._pairs = data, pairs[~torch.isin(pairs[:, 2], held_out)]
        sizes = range(len(self._latents))
        members = (torch.nonzero(self._pairs[:, 0] == which)[:, 0] for which in sizes)
        self._members = [item for item in members if len(item)]
        self._guided = model.guided
        self._steps = [_steps(model, rows[torch.tensor([0])].shape[2:]) for rows in self._latents]

    def __len__(self) -> int:
        return len(self._pairs)

    def digest(self) -> str:
        return digest([self._pairs, *self._steps]) + self._data.digest()

    def rows(self, seed: int, step: int, size: int) -> torch.Tensor:
        rng = np.random.default_rng((seed, step))
        members = self._members[rng.choice(len(self._members), p=[len(m) / len(self) for m in self._members])]
        times = -(-size // len(members))
        drawn = torch.from_numpy(rng.choice(times * len(members), size=size, replace=False))
        return members[drawn % len(members)] + drawn // len(members) * len(self)

    def batch(
        self, rows: torch.Tensor, draw: tuple[int, int] = (0, 0)
    ) -> tuple[torch.Tensor, torch.Tensor, TextStates, None]:
        pairs = self._pairs[rows % len(self)]
        which, captions = int(pairs[0, 0]), pairs[:, 2].clone()
        clean = self._latents[which][pairs[:, 1]].float()
        noise, timesteps = torch.empty_like(clean), torch.empty(len(rows))
        steps = self._steps[which]
        for place, row in enumerate(rows.tolist()):
            rng = np.random.default_rng((*draw, row))
            # Each as often as the sampler takes it, the ends too: what is never taught there gets worse.
            timesteps[place] = steps[rng.integers(len(steps))]
            noise[place] = torch.from_numpy(rng.standard_normal(clean[place].shape, dtype=np.float32))
            if self._guided and rng.random() < _EMPTY_SHARE:
                captions[place] = 0
        share = (timesteps / 1000)[:, None, None, None]
        return torch.lerp(clean, noise, share), timesteps, self._data.texts.index(captions), None


def _steps(model: Model, size: Sequence[int]) -> torch.Tensor:
    """Timesteps of the model's own sampling in a size."""
    scheduler = type(model.pipeline.scheduler).from_config(model.pipeline.scheduler.config)
    model.mmdit.set_timesteps(scheduler, model.defaults.num_inference_steps, *size)
    timesteps: torch.Tensor = scheduler.timesteps
    return timesteps
