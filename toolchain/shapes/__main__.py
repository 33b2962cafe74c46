"""Train the `shapes` model from nothing: `python -m toolchain.shapes --output DIR`.

Takes about an hour on two cores. Everything random is seeded. A run that
was stopped goes on where it was when it is started again with the same --work.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import rich
import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from toolchain.artifacts import new_directory
from toolchain.checkpoints import Checkpoints
from toolchain.evaluate import evaluate_shapes
from toolchain.families.view import GenerationDefaults, Model, open_model, save_model
from toolchain.optimize import Schedule
from toolchain.shapes import training
from toolchain.shapes.model import GENERATION_DEFAULTS, ShapesConfig, build_pipeline


def train(
    output: Annotated[Path, typer.Option(help="New directory for the trained pipeline.")],
    work: Annotated[Path, typer.Option(help="Where the state of the run is kept.")] = Path("runs/shapes"),
    device: Annotated[str, typer.Option(help="As torch names it.")] = "cuda"
    if torch.cuda.is_available()
    else "cpu",
    scale: Annotated[
        float, typer.Option(help="Share of the recipe's steps; less than 1 is for trying it out.")
    ] = 1.0,
) -> None:
    """Train every part, write the pipeline in 16 bits, and score it."""
    pipeline = build_pipeline(ShapesConfig())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
    columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.4f}")) as bars:

        def part(name: str, schedule: Schedule) -> tuple[Schedule, Checkpoints, training.Progress]:
            shorter = dataclasses.replace(schedule, steps=max(1, round(scale * schedule.steps)))
            return shorter, Checkpoints(directory=work / name), advance(name, shorter.steps)

        def advance(name: str, total: int) -> training.Progress:
            task = bars.add_task(name, total=total, loss=float("nan"))
            return lambda step, loss: bars.update(task, completed=step + 1, loss=loss)

        schedule, checkpoints, on_step = part("text", training.TEXT_SCHEDULE)
        training.train_text_(
            encoders, pipeline.tokenizer, schedule=schedule, checkpoints=checkpoints, on_step=on_step
        )
        schedule, checkpoints, on_step = part("vae", training.VAE_SCHEDULE)
        training.train_vae_(pipeline.vae, schedule=schedule, checkpoints=checkpoints, on_step=on_step)

        for module in (*encoders, pipeline.vae):
            module.eval().requires_grad_(False)
        num_scenes = max(1000, round(scale * training.NUM_SCENES))
        scenes = training.encode_scenes(pipeline, num_scenes, on_step=advance("scenes", num_scenes // 100))
        schedule, checkpoints, on_step = part("transformer", training.TRANSFORMER_SCHEDULE)
        training.train_transformer_(
            pipeline, scenes, schedule=schedule, checkpoints=checkpoints, on_step=on_step
        )

    model = Model(
        source="shapes",
        path=output,
        pipeline=pipeline.to("cpu"),
        stored_dtype=torch.float16,
        defaults=GenerationDefaults(**GENERATION_DEFAULTS),
        world="shapes",
    )
    with new_directory(output) as directory:
        save_model(model, directory)
    score = evaluate_shapes(open_model(str(output)), num_per_task=100)
    rich.print(f"{output}: ShapesEval {score.mean:.3f} ± {score.standard_error:.3f}  {score.tasks}")


if __name__ == "__main__":
    typer.run(train)
