"""How fast distillation steps are, and what precomputing and the shared prefix do for it.

`python -m benchmarks.throughput measure` writes its results and the end of `docs/data.md`.

Every way takes the same steps on the same pictures with the same two models, in turns within one process, and
is timed whole: reading its batch, the teacher, the student, the gradient and the update. Medians.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import torch
import typer
from PIL import Image

from benchmarks.machine import machine
from toolchain.artifacts import read_json, write_json
from toolchain.data.buckets import fitted
from toolchain.data.feed import Feed, open_feed
from toolchain.data.precompute import Settings, encode_pictures, precompute
from toolchain.data.shards import open_precomputed
from toolchain.data.sources import open_source
from toolchain.distill import DistillRecipe, Lesson
from toolchain.families import Model, open_model
from toolchain.families.mmdit import MMDiT, TextStates
from toolchain.geometry import Unit
from toolchain.losses import LossWeights, output_loss
from toolchain.optimize import Schedule
from toolchain.plan import CompressionPlan
from toolchain.progress import silent
from toolchain.prune import prune
from toolchain.shapes.world import captions, render, sample_scene

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "throughput.json"
PAGE = ROOT / "docs" / "data.md"
HEADING = "## Throughput"
app = typer.Typer(add_completion=False)
NUM_PICTURES, BATCH, ROUNDS = 64, 16, 15
# Of the 16 blocks of `shapes`, at the paper's depths; what stands before the first one is shared.
REMOVED = (10, 11, 13)
RECIPE = DistillRecipe(
    schedule=Schedule(steps=ROUNDS + 1, learning_rate=1e-5, warmup_steps=0),
    batch_size=BATCH,
    losses=LossWeights(features=0.0),
)


@app.command()
def measure() -> None:
    """Measure, and write the results."""
    write_json(
        RESULTS,
        {
            "schema_version": 1,
            "machine": machine() | {"threads": torch.get_num_threads()},
            "removed": REMOVED,
            "batch": BATCH,
            "rounds": ROUNDS,
            "seconds_per_step": seconds_per_step(),
        },
    )
    table()


@app.command()
def table() -> None:
    """Write the end of the page from the results."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text[: text.index(HEADING)] + section(read_json(RESULTS)), encoding="utf-8")


def section(results: dict[str, Any]) -> str:
    """The end of docs/data.md."""
    seconds, batch, machine = results["seconds_per_step"], results["batch"], results["machine"]
    fastest = min(seconds.values())
    note = (
        f"`shapes` without blocks {', '.join(map(str, results['removed']))}, {batch} pictures a step, "
        f"{machine['threads']} threads of an {machine['processor']}, torch {machine['torch']}. All ways take "
        "the same steps on the same pictures, in turns within one process; medians of "
        f"{results['rounds']}. The encoders of `shapes` are small beside its transformer; T5 is not. Made by "
        "`python -m benchmarks.throughput measure`."
    )
    lines = [
        HEADING,
        "",
        "| the loop | steps a second | pictures a second | time of a step |",
        "| --- | --- | --- | --- |",
        *(
            f"| {way} | {1 / value:.2f} | {batch / value:.1f} | {value / fastest:.2f} |"
            for way, value in seconds.items()
        ),
        "",
        fill(note, 130),
    ]
    return "\n".join(lines) + "\n"


def seconds_per_step(*, num_pictures: int = NUM_PICTURES, rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of a step of each way."""
    model = open_model("shapes")
    plan = _plan(model)
    with _data(model, num_pictures) as (feed, raw):
        ways = {
            "precomputed, shared prefix": _shared(model, plan, feed),
            "precomputed, two whole models": _whole(model, plan, feed),
            "encoding in the loop, shared prefix": _shared(model, plan, raw),
            "encoding in the loop, two whole models": _whole(model, plan, raw),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for step in range(rounds + 1):
            for name, take in ways.items():
                start = time.perf_counter()
                take(step)
                if step:  # the first is warm-up
                    seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


class Raw:
    """The same batches, encoded anew each time they come up, as where nothing is precomputed."""

    fixed = False

    def __init__(self, model: Model, feed: Feed, pictures: list[bytes], texts: list[str]) -> None:
        self._model, self._feed, self._pictures, self._texts = model, feed, pictures, texts

    def __len__(self) -> int:
        return len(self._feed)

    def digest(self) -> str:
        return self._feed.digest()

    def rows(self, seed: int, step: int, size: int) -> torch.Tensor:
        return self._feed.rows(seed, step, size)

    def batch(
        self, rows: torch.Tensor, draw: tuple[int, int] = (0, 0)
    ) -> tuple[torch.Tensor, torch.Tensor, TextStates, torch.Tensor | None]:
        latents, timesteps, _, velocities = self._feed.batch(rows, draw)
        which = [row % len(self) for row in rows.tolist()]
        pixels = np.stack([fitted(self._pictures[row], ((64, 64),)) for row in which])
        encode_pictures(self._model, pixels)
        return latents, timesteps, self._model.encode([self._texts[row] for row in which]), velocities


@contextmanager
def _data(model: Model, number: int) -> Iterator[tuple[Feed, Raw]]:
    rng, pictures, texts = np.random.default_rng(0), [], []
    for caption in islice(captions(held_out=False, seed=0), number):
        file = io.BytesIO()
        Image.fromarray(render(sample_scene(caption, rng))).save(file, "PNG")
        pictures.append(file.getvalue())
        texts.append(caption.text)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "set").mkdir()
        for index, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
            (root / "set" / f"{index:04}.png").write_bytes(picture)
            (root / "set" / f"{index:04}.txt").write_text(text)
        precompute(model, open_source(root / "set"), root / "out", Settings(), bar=silent)
        feed = open_feed(open_precomputed(root / "out"), model)
        yield feed, Raw(model, feed, pictures, texts)


def _plan(model: Model) -> CompressionPlan:
    kept = [index for index in range(len(model.geometry.blocks)) if index not in REMOVED]
    return CompressionPlan(
        model="benchmark",
        geometry=model.geometry,
        semantics="zero",
        rule="manual",
        removed=tuple(map(Unit, REMOVED)),
        strength={"embedders": 0.0, "head": 1.0} | {str(k): float(k > REMOVED[0]) for k in kept},
        asked={},
    )


def _shared(model: Model, plan: CompressionPlan, feed: Feed) -> Callable[[int], None]:
    lesson = Lesson(model.mmdit, prune(model, plan, share_prefix=True).mmdit, plan, RECIPE)

    def loss_at(step: int) -> torch.Tensor:
        batch = lesson.batch(feed, lesson.rows(feed, step), step)
        return lesson.loss(batch, lesson.ask([batch])[0])

    return _stepper(lesson.student, loss_at)


def _whole(model: Model, plan: CompressionPlan, feed: Feed) -> Callable[[int], None]:
    """Two models that share nothing; the same blocks learn, and the others keep no gradient."""
    student = prune(model, plan).mmdit
    student.transformer.requires_grad_(False)
    learning = ["head", *(str(new) for new, old in enumerate(plan.kept_blocks) if old > REMOVED[0])]
    for item in (item for unit in learning for item in student.parameters_of(unit)):
        item.requires_grad_(True)

    def loss_at(step: int) -> torch.Tensor:
        draw = (RECIPE.seed, step)
        latents, timesteps, text, _ = feed.batch(feed.rows(*draw, BATCH), draw)
        with torch.autocast("cpu", torch.bfloat16):
            target = model.mmdit.velocity(latents, timesteps, text)
            streams = student.begin(latents, timesteps, text)
            for block in student.blocks:
                streams = student.apply(block, streams)
            return output_loss(student.end(streams), target)

    return _stepper(student, loss_at)


def _stepper(student: MMDiT, loss_at: Callable[[int], torch.Tensor]) -> Callable[[int], None]:
    learning = [item for item in student.transformer.parameters() if item.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-5, fused=True)

    def take(step: int) -> None:
        loss_at(step).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return take


if __name__ == "__main__":
    app()
