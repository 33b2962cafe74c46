"""What one process does alone and several do together; test_processes.py has accelerate's launcher run it.

accelerate launch ... tests/toolchain/several.py SD3 FLUX DIRECTORY WAY...
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from toolchain.analysis import Rescorer, analyze, velocity_errors
from toolchain.artifacts import write_json
from toolchain.checkpoints import Checkpoints
from toolchain.data.feed import Feed, open_feed
from toolchain.data.precompute import Settings, precompute
from toolchain.data.shards import open_precomputed
from toolchain.data.sources import open_source
from toolchain.distill import DistillRecipe, InTurn, distill_
from toolchain.errors import ToolchainError
from toolchain.evaluate import evaluate_shapes
from toolchain.families import Model, open_model
from toolchain.geometry import Unit
from toolchain.losses import LossWeights
from toolchain.metrics.velocity import Velocity
from toolchain.optimize import Schedule
from toolchain.plan import CompressionPlan
from toolchain.processes import processes
from toolchain.progress import silent
from toolchain.prune import prune
from toolchain.trajectories import sample_states

Found = dict[str, torch.Tensor]

PROMPTS = ["a red circle", "two squares", "a star", "three blue circles", "a green square"]
OUTPUT = DistillRecipe(
    schedule=Schedule(steps=4, learning_rate=1e-3, warmup_steps=2, checkpoint_every=2),
    batch_size=4,
    losses=LossWeights(features=0.0),
    precision="float32",
)
FEATURES = replace(OUTPUT, losses=LossWeights(features=0.1))
IN_PARTS = replace(FEATURES, accumulate=2, schedule=replace(OUTPUT.schedule, ema_decay=0.9))
PREFIX = {"embedders": 0.0, "0": 0.0, "1": 0.0, "2": 0.0, "4": 1.0, "5": 0.5, "head": 1.0}
EVERYTHING = dict.fromkeys([*"01245", "embedders", "head"], 1.0)
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
OF_FLUX = {"embedders": 0.0, "0": 0.0, "2": 1.0, "3": 1.0, "4": 1.0, "head": 1.0}


class Stopped(Exception):
    """In the middle of a training."""


def stop(step: int, loss: float) -> None:
    if step == 2:
        raise Stopped


def teach(
    teacher: Model,
    states: Feed,
    recipe: DistillRecipe,
    *,
    removed: str = "3",
    strength: dict[str, float] = PREFIX,
    **options: Any,
) -> torch.Tensor:
    """The weights of a student in the end, as one row."""
    plan = CompressionPlan(
        model="tiny",
        geometry=teacher.geometry,
        semantics="zero",
        rule="manual",
        removed=(Unit.parse(removed),),
        strength=strength,
        asked={},
    )
    student = prune(teacher, plan, share_prefix=True)
    distill_(teacher, student, plan, states, recipe, **options)
    return torch.cat([item.detach().float().flatten() for item in student.pipeline.transformer.parameters()])


def precomputed(sd3: Path, source: Path, output: Path) -> None:
    """What trainings on pictures and on prompts read."""
    model, settings = open_model(str(sd3)), Settings(batch_size=2, shard_rows=2, dtype="float32")
    for name in ("pictures", "prompts.txt"):
        precompute(model, open_source(source / name), output / Path(name).stem, settings, bar=silent)


def begin(sd3: Path, checkpoints: Path) -> None:
    """A training that ends in its middle."""
    model = open_model(str(sd3))
    begun(partial(teach, model, sample_states(model, PROMPTS, seed=0, batch_size=2)), checkpoints)


def begun(taught: Callable[..., Any], directory: Path) -> Checkpoints:
    """What is left of a training that ended in its middle."""
    checkpoints = Checkpoints(directory=directory)
    try:
        taught(OUTPUT, checkpoints=checkpoints, on_step=stop)
    except Stopped:
        return checkpoints
    raise AssertionError("it went on to its end")


def measured(sd3: Path) -> Found:
    """What an analysis finds."""
    model = open_model(str(sd3))
    states = sample_states(model, PROMPTS, seed=0, batch_size=2)
    found = analyze(model, Velocity(), PROMPTS, seeds=(0,), batch_size=8)
    rescored = Rescorer(model, states, "zero", batch_size=8)(
        (Unit(3),), (Unit(0), Unit.parse("2.ff"), Unit(4), Unit(5))
    )
    return {
        "sampled": states.latents,
        "harms": torch.tensor([item.harm for item in found.harms]),
        "similarity": torch.tensor(found.similarity),
        "rescored": torch.tensor([*rescored.values()]),
        "errors": velocity_errors(model.mmdit.without([Unit(3)], "zero"), states, batch_size=8),
        "score": torch.tensor([*evaluate_shapes(model, num_per_task=20).tasks.values()]),
    }


def students(sd3: Path, flux: Path, directory: Path, *, rest: bool = True) -> Found:
    """What trainings end with, by what is special about them."""
    model, other = open_model(str(sd3)), open_model(str(flux), precision="stored")
    taught = partial(teach, model, sample_states(model, PROMPTS, seed=0, batch_size=2))
    of_flux = sample_states(other, PROMPTS[:2], seed=0)
    pictures = open_feed(open_precomputed(directory.parent / "pictures"), model)
    bfloat16 = replace(FEATURES, batch_size=2, precision="bfloat16")
    found = {
        "nothing": taught(OUTPUT),
        "features, in parts, averaged": taught(IN_PARTS),
        "nothing frozen, recomputed": taught(replace(FEATURES, checkpointing=True), strength=EVERYTHING),
        "pictures, in parts": teach(model, pictures, replace(OUTPUT, accumulate=2)),
        "16 bits": teach(other, of_flux, bfloat16, removed="1", strength=OF_FLUX),
        "resumed": taught(OUTPUT, checkpoints=begun(taught, directory / "own")),
        "begun by one": taught(OUTPUT, checkpoints=Checkpoints(directory=directory / "begun")),
    }
    if rest:
        found["in turn"] = taught(IN_PARTS, in_turn=InTurn(steps=3, directory=directory))
        found["cached"] = taught(OUTPUT, cache_prefix=directory / "streams.safetensors")
    return found


def refusals(sd3: Path) -> dict[str, str]:
    """What each of several processes says."""

    def said(action: Callable[[], object]) -> str:
        try:
            action()
        except ToolchainError as error:
            return str(error)
        raise AssertionError("nothing was refused")

    def refuse(item: int) -> int:
        if item == 1:
            raise ToolchainError(f"process {processes().rank} refuses")
        return item

    model, here = open_model(str(sd3)), processes()
    states = sample_states(model, PROMPTS, seed=0)
    taught = partial(teach, model, states)
    damaged = replace(states, velocities=states.velocities * (float("nan") if here.rank == 1 else 1.0))
    return {
        "item": said(lambda: list(here.each(range(3), refuse))),
        "first": said(lambda: here.first(lambda: refuse(1))),
        "damaged": said(lambda: teach(model, damaged, OUTPUT)),
        "batch": said(lambda: taught(replace(IN_PARTS, batch_size=6))),
        "normalised": said(lambda: taught(replace(OUTPUT, losses=LossWeights(normalised=True)))),
        "sharded": said(lambda: taught(OUTPUT, cache_prefix=Path("streams.safetensors"))),
        "version": said(lambda: _told(FSDP | {"FSDP_VERSION": "1"}, lambda: taught(OUTPUT))),
    }


def _told(variables: dict[str, str], action: Callable[[], Any]) -> Any:
    """What comes of something where accelerate's launcher says so."""
    os.environ |= variables
    processes.cache_clear()
    return action()


def main(sd3: Path, flux: Path, directory: Path) -> None:
    here = processes()
    found = measured(sd3)
    precomputed(sd3, directory / "source", directory / "together")
    for name, item in students(sd3, flux, directory / "replicated").items():
        found[f"replicated/{name}"] = item
    sharded = _told(FSDP, lambda: students(sd3, flux, directory / "sharded", rest=False))
    for name, item in sharded.items():
        found[f"sharded/{name}"] = item
    model = open_model(str(sd3))
    taught = partial(teach, model, sample_states(model, PROMPTS, seed=0, batch_size=2), IN_PARTS)
    for stage, place in (("3", "cpu"), ("2", "none")):
        zero = {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage,
            "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": place,
        }
        found[f"zero {stage}/features, in parts, averaged"] = _told(zero, taught)
    write_json(directory / f"refusals-{here.rank}.json", refusals(sd3))
    save_file(found, directory / f"found-{here.rank}.safetensors")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
