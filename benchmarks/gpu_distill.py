"""What distilling Stable Diffusion 3.5 takes on a GPU: time per step, peak memory, and which cards it fits.

    python -m benchmarks.gpu_distill                       # on a GPU of 80 GB
    python -m benchmarks.gpu_distill --small --device cpu  # two tiny models, to see that it runs

Geometries are the published ones, and what goes is the paper's set for each; weights are random, made on the
device in bfloat16. A card is tried by letting PyTorch have no more than its memory, less one GiB for the
system: what does not fit runs out of memory. docs/gpu.md has what it found on an H100.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from rich.console import Console
from rich.table import Table

from benchmarks.distill_cost import Whole
from benchmarks.machine import machine
from recipes.estimate import plan_of
from recipes.schema import load_recipe
from toolchain.artifacts import write_json
from toolchain.distill import DistillRecipe, InTurn, distill_
from toolchain.families import open_model
from toolchain.families.mmdit import TextStates
from toolchain.families.view import GenerationDefaults, Model
from toolchain.footprint import Mode, memory_arithmetic
from toolchain.losses import LossWeights
from toolchain.optimize import Schedule, optimize_
from toolchain.plan import CompressionPlan
from toolchain.prune import prune
from toolchain.trajectories import States

RESULTS = Path(__file__).parent / "results" / "gpu_distill.json"
RECIPES = {"SD3.5-Medium": "sd3.5-medium-paper", "SD3.5-Large": "sd3.5-large-turbo-paper-20"}
CARDS_GIB = (24, 48)
RESERVED_GIB = 1
WAYS: tuple[Mode, ...] = ("whole", "shared", "cached", "in-turn")
BATCH, NUM_STATES = 1, 4
GIB = 2**30

app = typer.Typer(add_completion=False)


@app.command()
def main(
    device: Annotated[str, typer.Option(help="Where to train.")] = "cuda",
    steps: Annotated[int, typer.Option(help="Of each way; the first is not timed.", min=2)] = 8,
    small: Annotated[bool, typer.Option("--small", help="The same with tiny models.")] = False,
    output: Annotated[Path, typer.Option(help="JSON to write.")] = RESULTS,
) -> None:
    """Measure, print, and write the results."""
    where = torch.device(device)
    found = {name: _measure(recipe, where, steps, small) for name, recipe in RECIPES.items()}
    gpu = torch.cuda.get_device_name(where) if where.type == "cuda" else None
    results = {
        "schema_version": 1,
        "machine": machine() | {"gpu": gpu, "device": device},
        "batch": BATCH,
        "small": small,
        "models": found,
    }
    write_json(output, results)
    _print(results)


def _measure(recipe: str, device: torch.device, steps: int, small: bool) -> dict[str, Any]:
    model, plan, states = _problem(recipe, device, small)
    rows: dict[str, Any] = {}
    for way in WAYS:
        arithmetic = memory_arithmetic(
            plan, mode=way, inner_width=model.pipeline.transformer.inner_dim, batch_size=BATCH
        ).total
        rows[way] = {
            **_run(way, model, plan, states, steps, None),
            "arithmetic_bytes": arithmetic,
            "fits": {
                card: _run(way, model, plan, states, 2, card)["seconds_per_step"] is not None
                for card in CARDS_GIB
                if device.type == "cuda"
            },
        }
    return {"parameters": model.num_parameters, "removed": list(map(str, plan.removed)), "ways": rows}


def _problem(recipe: str, device: torch.device, small: bool) -> tuple[Model, CompressionPlan, States]:
    """A teacher with random weights, what goes of it, and states that none of it has sampled."""
    chosen = load_recipe(recipe)
    published = open_model(chosen.model, precision="config")
    config = dict(published.pipeline.transformer.config)
    side, tokens = published.defaults.height, published.geometry.text_tokens
    if small:
        chosen = replace(chosen, remove="2")
        config |= {"num_layers": 4, "num_attention_heads": 1, "caption_projection_dim": 64}
        config |= {"joint_attention_dim": 8, "pooled_projection_dim": 8, "pos_embed_max_size": 8}
        config |= {"sample_size": 8, "dual_attention_layers": config["dual_attention_layers"][:1]}
        side, tokens = 64, 5
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            transformer = SD3Transformer2DModel.from_config(config)
    finally:
        torch.set_default_dtype(before)
    # diffusers begins with a head of zeros, whose gradient ends there.
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.02)
    model = Model(
        source="random",
        path=Path(),
        pipeline=StableDiffusion3Pipeline(
            transformer.eval().requires_grad_(False), FlowMatchEulerDiscreteScheduler(), *[None] * 7
        ),
        stored_dtype=torch.bfloat16,
        defaults=GenerationDefaults(height=side, width=side),
        world=None,
    )
    shape = (NUM_STATES, model.mmdit.latent_channels, side // 8, side // 8)
    states = States(
        latents=torch.randn(shape),
        timesteps=torch.rand(NUM_STATES) * 1000,
        velocities=torch.randn(shape),
        prompt_index=torch.arange(NUM_STATES),
        text=TextStates(
            tokens_BTJ=torch.randn(NUM_STATES, tokens, config["joint_attention_dim"]),
            pooled_BP=torch.randn(NUM_STATES, config["pooled_projection_dim"]),
        ),
        guidance_scale=None,
    )
    return model, plan_of(chosen, model.geometry), states


def _run(
    way: Mode, model: Model, plan: CompressionPlan, states: States, steps: int, card_gib: int | None
) -> dict[str, float | None]:
    """Seconds of a step and the most memory; None where it runs out of that, or has no GPU to ask."""
    device = next(model.pipeline.transformer.parameters()).device
    cuda = device.type == "cuda"
    if cuda:
        _free()
        total = torch.cuda.get_device_properties(device).total_memory
        most = total if card_gib is None else (card_gib - RESERVED_GIB) * GIB
        torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), device)
        torch.cuda.reset_peak_memory_stats(device)
    ends: list[float] = []
    try:
        _train(way, model, plan, states, steps, lambda *_: ends.append(time.perf_counter()))
    except torch.OutOfMemoryError:
        return {"seconds_per_step": None, "peak_bytes": None, "peak_reserved_bytes": None}
    taken = [end - start for start, end in pairwise(ends)]
    return {
        "seconds_per_step": statistics.median(taken),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device) if cuda else None,
    }


def _train(
    way: Mode,
    model: Model,
    plan: CompressionPlan,
    states: States,
    steps: int,
    on_step: Callable[[int, float], None],
) -> None:
    recipe = DistillRecipe(
        schedule=Schedule(steps=steps, learning_rate=1e-6, warmup_steps=0),
        batch_size=BATCH,
        losses=LossWeights(),
        checkpointing=True,
    )
    if way == "whole":
        pair = Whole(model, plan, states, recipe, everything=False)
        optimize_(pair.student.transformer, pair.loss_at, recipe.schedule, on_step=on_step)
        return
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as directory:
        distill_(
            model,
            prune(model, plan, share_prefix=True),
            plan,
            states,
            recipe,
            cache_prefix=Path(directory) / "streams" if way == "cached" else None,
            in_turn=InTurn(steps=NUM_STATES, directory=Path(directory)) if way == "in-turn" else None,
            on_step=on_step,
        )


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _print(results: dict[str, Any]) -> None:
    table = Table("model", "way", "s per step", "peak, GiB", "arithmetic, GiB", *map(_card, CARDS_GIB))
    for name, model in results["models"].items():
        for way, row in model["ways"].items():
            seconds, peak, sum_ = row["seconds_per_step"], row["peak_bytes"], row["arithmetic_bytes"]
            table.add_row(
                name,
                way,
                "out of memory" if seconds is None else f"{seconds:.3f}",
                "-" if peak is None else f"{peak / GIB:.1f}",
                f"{sum_ / GIB:.1f}",
                *({True: "yes", False: "no", None: "-"}[row["fits"].get(card)] for card in CARDS_GIB),
            )
    Console(width=110).print(table)


def _card(gib: int) -> str:
    return f"fits {gib} GB"


if __name__ == "__main__":
    app()
