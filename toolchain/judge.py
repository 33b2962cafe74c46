"""What a model is judged by at every stage: always the same states, captions, prompts and noise."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from toolchain.analysis import velocity_errors
from toolchain.errors import ToolchainError
from toolchain.evaluate import BATCH_SIZE, ShapesScore, evaluate_shapes, num_batches
from toolchain.families.view import Model
from toolchain.gate import Gate
from toolchain.metrics import PictureMetric, open_metric
from toolchain.processes import processes
from toolchain.progress import Bar, silent
from toolchain.trajectories import States

_PAINTED = 8
"""Pictures at once."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The model after one stage."""

    name: str
    num_parameters: int
    transformer_bytes: int
    """As stored."""
    velocity_error: float
    """Mean relative squared error against the teacher, on states neither planned nor trained on."""
    score: ShapesScore | None
    """None where the model is of another world, or no score was asked for."""
    gate: float | None
    """What the metric of the gate gives; None without a gate."""


class Judge:
    """Judges a teacher and its students.

    Args:
        teacher: Whose pictures are to be had again.
        states: Of its sampling, neither planned nor trained on.
        prompts: What they are of; pictures are painted from these.
        gate: What else is measured, if it is more than velocities and ShapesEval.
        captions_per_task: Of ShapesEval; 0 leaves it out.
        seed: Of the captions and all noise.

    Raises:
        ToolchainError: The gate's metric is not to be had, or not for this model.
    """

    def __init__(
        self,
        teacher: Model,
        states: States,
        prompts: Sequence[str],
        *,
        gate: Gate | None,
        captions_per_task: int,
        seed: int,
    ) -> None:
        self._states, self._prompts, self._seed = states, list(prompts), seed
        self._captions = captions_per_task if teacher.world == "shapes" else 0
        self._gate, self._metric = gate, None
        if gate is None or gate.metric == "velocity":
            return
        if gate.metric == "shapes":
            if not self._captions:
                raise ToolchainError(
                    f"the gate {gate} is of ShapesEval, which is about models of the shapes world and needs "
                    "captions (--per-task)"
                )
            return
        metric = open_metric(gate.metric)
        if not isinstance(metric, PictureMetric):
            raise ToolchainError(f"the gate {gate} is of no metric of pictures, nor of velocity")
        metric.check(self._prompts)
        self._metric = metric

    def __call__(self, name: str, model: Model, bar: Bar = silent) -> Stage:
        """Judge a model at the stage of a name."""
        with _products(model):
            error = float(velocity_errors(model.mmdit, self._states).mean())
            score = self._score(name, model, bar) if self._captions else None
            value = None
            if self._metric is not None:
                scores = self._metric.scores(self._prompts, self.paint(model, len(self._prompts)))
                value = float(scores.mean())
        if self._gate is not None and value is None:
            value = score.mean if score is not None and self._gate.metric == "shapes" else error
        return Stage(
            name=name,
            num_parameters=model.num_parameters,
            transformer_bytes=model.num_parameters * model.stored_dtype.itemsize,
            velocity_error=error,
            score=score,
            gate=value,
        )

    def paint(self, model: Model, number: int) -> npt.NDArray[np.uint8]:
        """Pictures of the first prompts [N, height, width, 3], from the same noise for every model."""
        shape = (len(self._prompts), *model.latent_shape)
        noise = np.random.default_rng(self._seed).standard_normal(shape, dtype=np.float32)
        starts = range(0, min(number, len(noise)), _PAINTED)
        batches = [slice(start, min(start + _PAINTED, number)) for start in starts]
        with _products(model):
            parts = processes().each(batches, lambda rows: model.paint(self._prompts[rows], noise[rows]))
            return np.concatenate(list(parts))

    def _score(self, name: str, model: Model, bar: Bar) -> ShapesScore:
        advance = bar(f"ShapesEval, {name}", num_batches(self._captions), unit="pictures", each=BATCH_SIZE)
        return evaluate_shapes(model, num_per_task=self._captions, seed=self._seed, on_batch=advance)


def _products(model: Model) -> AbstractContextManager[Any]:
    """What lets a model run in the middle of its training, when only what learns of it is float32."""
    transformer = model.pipeline.transformer
    if {item.dtype for item in transformer.parameters()} == {model.pipeline.vae.dtype}:
        return nullcontext()
    return torch.autocast(processes().device.type, torch.bfloat16)


def write_grid(path: Path, pictures: npt.NDArray[np.uint8]) -> None:
    """Write pictures [N, height, width, 3] as one PNG, row by row in about a square, beside and renamed."""
    number, height, width, _ = pictures.shape
    columns = int(np.ceil(number**0.5))
    rows = -(-number // columns)
    sheet = np.full((rows * height, columns * width, 3), 255, dtype=np.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // columns * height, index % columns * width
        sheet[top : top + height, left : left + width] = picture
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    Image.fromarray(sheet).save(beside, format="png")
    beside.replace(path)
