"""ShapesEval: how often a model of the `shapes` world paints what it was asked, task by task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from toolchain.processes import processes
from toolchain.shapes.detector import score
from toolchain.shapes.world import TASKS, evaluation_captions

BATCH_SIZE = 50


class Painter(Protocol):
    """Anything that paints: a model in torch or a bundle on a device."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the initial noise."""

    def paint(self, prompts: list[str], noise: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """Prompts and their noise [N, C, H, W] to pictures [N, height, width, 3]."""


@dataclass(frozen=True, kw_only=True)
class ShapesScore:
    """Shares of held-out captions painted right; noise is the same for every model asked."""

    mean: float
    """Over the six tasks."""
    standard_error: float
    """Of the mean, from the number of captions."""
    tasks: dict[str, float]
    num_per_task: int
    seed: int


def evaluate_shapes(
    painter: Painter, *, num_per_task: int, seed: int = 0, on_batch: Callable[[], None] | None = None
) -> ShapesScore:
    """Have the first held-out captions of every task painted, and score the pictures."""
    captions = evaluation_captions(num_per_task, seed=seed)
    shape = (len(captions), *painter.latent_shape)
    noise = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    right: dict[str, list[float]] = {task: [] for task in TASKS}

    def judge(start: int) -> list[float]:
        batch = captions[start : start + BATCH_SIZE]
        images = painter.paint([caption.text for caption in batch], noise[start : start + BATCH_SIZE])
        return [score(caption, image) for caption, image in zip(batch, images, strict=True)]

    starts = range(0, len(captions), BATCH_SIZE)
    for start, scores in zip(starts, processes().each(starts, judge), strict=True):
        for caption, value in zip(captions[start:], scores, strict=False):
            right[caption.task].append(value)
        if on_batch is not None:
            on_batch()
    tasks = {task: float(np.mean(values)) for task, values in right.items()}
    variance = [share * (1 - share) / num_per_task for share in tasks.values()]
    return ShapesScore(
        mean=float(np.mean(list(tasks.values()))),
        standard_error=float(np.sqrt(sum(variance)) / len(TASKS)),
        tasks=tasks,
        num_per_task=num_per_task,
        seed=seed,
    )


def num_batches(num_per_task: int) -> int:
    """How often `evaluate_shapes` calls `on_batch`."""
    return -(-num_per_task * len(TASKS) // BATCH_SIZE)
