"""What sharing the prefix saves when a student is distilled, in time and in memory.

    python -m benchmarks.distill_cost        # about four minutes on two cores

The model has random weights. Time: steps of all ways in turns within one process, medians. Memory: each way
in a process of its own; the highest anonymous memory (what malloc holds; mapped files do not count) over some
steps after the first, less that after the imports. glibc is told to give freed memory back at once.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from rich.console import Console
from rich.table import Table
from torch.utils.checkpoint import checkpoint

from benchmarks.machine import machine
from toolchain.artifacts import write_json
from toolchain.distill import DistillRecipe, InTurn, Lesson, distill_
from toolchain.families.flux import Flux
from toolchain.families.mmdit import MMDiT, TextStates
from toolchain.families.sd3 import SD3
from toolchain.families.view import GenerationDefaults, Model
from toolchain.footprint import DistillMemory, Mode, memory_arithmetic
from toolchain.geometry import Geometry, Unit
from toolchain.losses import LossWeights, feature_loss, output_loss
from toolchain.optimize import Schedule, optimize_
from toolchain.plan import CompressionPlan
from toolchain.prefix import StreamCache, read_stream_cache, write_stream_cache
from toolchain.prune import prune
from toolchain.trajectories import States

RESULTS = Path(__file__).parent / "results" / "distill_cost.json"
BLOCKS, HEADS, TEXT_TOKENS, BATCH, NUM_STATES = 24, 8, 77, 8, 32
# The paper's {25-28, 31-34} of 38 blocks, at the same depths and as large a share of 24.
REMOVED = (16, 17, 18, 20, 21)
ROUNDS, MEMORY_STEPS, TURN = 3, 6, 2
GIB = 2**30
_STEPS = Schedule(steps=MEMORY_STEPS, learning_rate=1e-5, warmup_steps=0)
RECIPE = DistillRecipe(schedule=_STEPS, batch_size=BATCH)


def main() -> None:
    """Measure, print, and write the results."""
    results = {
        "schema_version": 1,
        "machine": machine() | {"threads": torch.get_num_threads()},
        "model": {
            "blocks": BLOCKS,
            "width": HEADS * 64,
            "image_tokens": 256,
            "text_tokens": TEXT_TOKENS,
            "batch": BATCH,
            "removed": REMOVED,
            "precision": RECIPE.precision,
        },
        "seconds_per_step": _time(),
        "peak_bytes": {way: _measured_apart(way) for way in MEMORY_WAYS},
        "arithmetic": _arithmetic(),
    }
    write_json(RESULTS, results)
    _print(results)


def _model() -> tuple[Model, CompressionPlan, States]:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=32,
        num_layers=BLOCKS,
        num_attention_heads=HEADS,
        joint_attention_dim=512,
        caption_projection_dim=HEADS * 64,
        pooled_projection_dim=512,
        qk_norm="rms_norm",
    )
    # diffusers begins with a head of zeros, whose gradient ends there.
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.02)
    pipeline = StableDiffusion3Pipeline(
        transformer.eval().requires_grad_(False),
        FlowMatchEulerDiscreteScheduler(),
        *[None] * 7,
    )
    model = Model(
        source="random",
        path=Path(),
        pipeline=pipeline,
        stored_dtype=torch.float32,
        defaults=GenerationDefaults(height=256, width=256, max_sequence_length=0),
        world=None,
    )
    shape = (NUM_STATES, 16, 32, 32)
    states = States(
        latents=torch.randn(shape),
        timesteps=torch.rand(NUM_STATES) * 1000,
        velocities=torch.randn(shape),
        prompt_index=torch.arange(NUM_STATES),
        text=TextStates(
            tokens_BTJ=torch.randn(NUM_STATES, TEXT_TOKENS, 512), pooled_BP=torch.randn(NUM_STATES, 512)
        ),
        guidance_scale=None,
    )
    return model, _plan(model.geometry, REMOVED), states


def _plan(geometry: Geometry, removed: tuple[int, ...]) -> CompressionPlan:
    kept = [index for index in range(len(geometry.blocks)) if index not in removed]
    return CompressionPlan(
        model="benchmark",
        geometry=geometry,
        semantics="zero",
        rule="manual",
        removed=tuple(map(Unit, removed)),
        strength={"embedders": 0.0, "head": 1.0} | {str(k): float(k > removed[0]) for k in kept},
        asked={},
    )


class Whole:
    """Two models that share nothing, each run from its first block to its last."""

    def __init__(
        self,
        model: Model,
        plan: CompressionPlan,
        states: States,
        recipe: DistillRecipe,
        *,
        everything: bool,
    ) -> None:
        student = prune(model, plan)
        self.teacher, self.student, self.plan, self.states = model.mmdit, student.mmdit, plan, states
        self.recipe, self.first = recipe, plan.first_change
        own = self.student
        own.transformer.requires_grad_(everything)
        learning = ["head", *(str(k) for k, old in enumerate(plan.kept_blocks) if old > self.first)]
        for item in (item for unit in learning for item in own.parameters_of(unit)):
            item.requires_grad_(True)
        for item in own.transformer.parameters():
            if item.requires_grad:
                item.data = item.data.float()
        self.device = own.parameters_of("head")[0].device

    def loss_at(self, step: int) -> torch.Tensor:
        """The default loss: the velocity, and what the blocks behind the first removed one give."""
        batch = self.recipe.batch_size
        rows = (torch.arange(batch) + step * batch) % len(self.states)
        latents, timesteps, text, _ = self.states.batch(rows)
        latents, timesteps = latents.to(self.device), timesteps.to(self.device)
        text = TextStates(
            tokens_BTJ=text.tokens_BTJ.to(self.device), pooled_BP=text.pooled_BP.to(self.device)
        )
        with torch.autocast(self.device.type, torch.bfloat16):
            with torch.no_grad():
                target, theirs = self._run(self.teacher, latents, timesteps, text)
            predicted, ours = self._run(self.student, latents, timesteps, text)
        pairs = [
            (mine, other)
            for k, old in enumerate(self.plan.kept_blocks)
            if old > self.first
            for mine, other in zip(ours[k], theirs[old], strict=True)
            if mine is not None and other is not None
        ]
        weights = self.recipe.losses
        return weights.output * output_loss(predicted, target) + weights.features * feature_loss(pairs)

    def _run(
        self, model: MMDiT, latents: torch.Tensor, timesteps: torch.Tensor, text: TextStates
    ) -> tuple[torch.Tensor, dict[int, tuple[torch.Tensor | None, ...]]]:
        streams = model.begin(latents, timesteps, text)
        seen: dict[int, tuple[torch.Tensor | None, ...]] = {}
        for index, block in enumerate(model.blocks):
            if self.recipe.checkpointing and torch.is_grad_enabled():
                streams = checkpoint(model.apply, block, streams, use_reentrant=False)
            else:
                streams = model.apply(block, streams)
            # Nothing is removed before it, so it is the student's first own block as well.
            if index >= self.first:
                seen[index] = (streams.image_BND, streams.text_BTD)
        return model.end(streams), seen


def _time() -> dict[str, float]:
    model, plan, states = _model()

    def shared(
        features: float, cache: StreamCache | None = None
    ) -> tuple[MMDiT, Callable[[int], torch.Tensor]]:
        student = prune(model, plan, share_prefix=True)
        recipe = DistillRecipe(schedule=_STEPS, batch_size=BATCH, losses=LossWeights(features=features))
        lesson = Lesson(model.mmdit, student.mmdit, plan, recipe)

        def loss_at(step: int) -> torch.Tensor:
            rows = lesson.rows(states, step)
            batch = lesson.batch(states, rows)
            given = None if cache is None else [cache.streams(rows, lesson.device)]
            return lesson.loss(batch, lesson.ask([batch], given)[0])

        return lesson.student, loss_at

    def whole(*, everything: bool) -> tuple[MMDiT, Callable[[int], torch.Tensor]]:
        way = Whole(model, plan, states, RECIPE, everything=everything)
        return way.student, way.loss_at

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "streams"
        student = prune(model, plan, share_prefix=True)
        lesson = Lesson(model.mmdit, student.mmdit, plan, RECIPE)
        write_stream_cache(
            path,
            lambda rows: lesson.prefix(lesson.batch(states, rows)),
            len(states),
            batch_size=BATCH,
            dtype=torch.bfloat16,
            made_from={},
        )
        cache = read_stream_cache(path, {})
        ways = {
            "whole": whole(everything=False),
            "whole, everything learns": whole(everything=True),
            "shared": shared(1e-4),
            "shared, no features": shared(0.0),
            "cached": shared(1e-4, cache),
            "cached, no features": shared(0.0, cache),
        }
        steps = {name: _stepper(*way) for name, way in ways.items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for step in range(ROUNDS + 1):
            for name, take in steps.items():
                start = time.perf_counter()
                take(step)
                if step:  # the first is warm-up
                    seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _stepper(student: MMDiT, loss_at: Callable[[int], torch.Tensor]) -> Callable[[int], None]:
    learning = [item for item in student.transformer.parameters() if item.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-5, fused=True)

    def take(step: int) -> None:
        loss_at(step).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return take


MEMORY_WAYS = ("whole", "whole, everything learns", "shared", "cached", "in turn")


def _measured_apart(way: str) -> int:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.distill_cost", way],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(json.loads(done.stdout.splitlines()[-1]))


def _measure_memory(way: str) -> int:
    base = _anonymous_bytes()
    model, plan, states = _model()
    with _peak() as peak, tempfile.TemporaryDirectory(dir=Path.cwd()) as directory:

        def on_step(step: int, _: float) -> None:
            if step == 0:
                peak[0] = 0  # the optimiser has its state, and what is to rest has left

        if way.startswith("whole"):
            pair = Whole(model, plan, states, RECIPE, everything="everything" in way)
            optimize_(pair.student.transformer, pair.loss_at, _STEPS, on_step=on_step)
        else:
            distill_(
                model,
                prune(model, plan, share_prefix=True),
                plan,
                states,
                RECIPE,
                cache_prefix=Path(directory) / "streams" if way == "cached" else None,
                in_turn=InTurn(steps=TURN, directory=Path(directory)) if way == "in turn" else None,
                on_step=on_step,
            )
        return peak[0] - base


@contextmanager
def _peak() -> Iterator[list[int]]:
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], _anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def _arithmetic() -> list[dict[str, object]]:
    """Distilling the real models at 1024 x 1024, one sample at a time."""
    with torch.device("meta"):
        large = SD3Transformer2DModel(
            num_layers=38,
            num_attention_heads=38,
            caption_projection_dim=2432,
            qk_norm="rms_norm",
            pos_embed_max_size=192,
        )
        flux = FluxTransformer2DModel()
    sd3 = SD3(large, guidance_scale=1.0).geometry(height=1024, width=1024, text_tokens=333)
    schnell = Flux(flux, guidance_scale=1.0).geometry(height=1024, width=1024, text_tokens=256)
    # The paper's set for SD3.5-Large. That for FLUX is not published: the same depths of its 57 blocks.
    cases = {
        "SD3.5-Large": (_plan(sd3, (25, 26, 27, 28, 31, 32, 33, 34)), 2432),
        "FLUX.1-schnell": (_plan(schnell, (*range(38, 44), *range(47, 52))), 3072),
    }
    modes: tuple[tuple[Mode, bool], ...] = (
        ("whole", True),
        ("shared", True),
        ("cached", True),
        ("cached", False),
        ("in-turn", True),
        ("in-turn", False),
    )
    rows: list[dict[str, object]] = []
    for name, (plan, width) in cases.items():
        for mode, features in modes:
            for bits, moment_bytes in ((32, 8), (8, 2)):
                memory: DistillMemory = memory_arithmetic(
                    plan, mode=mode, inner_width=width, features=features, moment_bytes=moment_bytes
                )
                rows.append(
                    {"model": name, "mode": mode, "features": features, "moment_bits": bits}
                    | asdict(memory)
                    | {"total": memory.total}
                )
    return rows


def section(results: dict[str, Any]) -> list[str]:
    """What docs/benchmarks.md says of it."""
    model, seconds, peaks = results["model"], results["seconds_per_step"], results["peak_bytes"]
    lines = [
        f"{model['blocks']} blocks of {model['width']} without {', '.join(map(str, model['removed']))},",
        f"batch {model['batch']}, against two whole models of which the same tail learns:",
        "",
        "| | time per step | peak memory |",
        "| --- | --- | --- |",
    ]
    for way in dict.fromkeys((*seconds, *peaks)):
        ratios = (f"{of[way] / of['whole']:.2f}" if way in of else "not measured" for of in (seconds, peaks))
        lines.append(f"| {way} | {' | '.join(ratios)} |")
    lines += [
        "",
        "By arithmetic, GiB at 1024 x 1024, batch 1, checkpointing, 16-bit teacher, float32 moments:",
        "",
        "| | " + " | ".join(dict.fromkeys(row["model"] for row in results["arithmetic"])) + " |",
        "| --- | --- | --- |",
    ]
    totals: dict[str, list[str]] = {}
    for row in results["arithmetic"]:
        if row["moment_bits"] == 32:
            way = row["mode"] if row["features"] else f"{row['mode']}, no features"
            totals.setdefault(way, []).append(f"{row['total'] / GIB:.1f}")
    return [*lines, *(f"| {way} | {' | '.join(sizes)} |" for way, sizes in totals.items())]


def _print(results: dict[str, object]) -> None:
    console = Console()
    for key, unit, scale in (("seconds_per_step", "s", 1.0), ("peak_bytes", "GiB", GIB)):
        values = results[key]
        assert isinstance(values, dict)
        table = Table("way", unit, "of whole", title=key.replace("_", " "))
        for way, value in values.items():
            table.add_row(way, f"{value / scale:.2f}", f"{value / values['whole']:.2f}")
        console.print(table)
    rows = results["arithmetic"]
    assert isinstance(rows, list)
    table = Table(
        "model", "mode", "features", "moments", *list(rows[0])[4:], title="GiB, batch of one, 1024²"
    )
    for row in rows:
        sizes = [f"{row[name] / GIB:.1f}" for name in list(row)[4:]]
        table.add_row(row["model"], row["mode"], str(row["features"]), str(row["moment_bits"]), *sizes)
    Console(width=200).print(table)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(_measure_memory(sys.argv[1]))
    else:
        main()
