"""The pictures of a report as PNG files, for slides and documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from report.evidence import Evidence
from report.measure import Measured
from toolchain.picture import draw_plan
from toolchain.plots import draw_sensitivity

__all__ = ["draw_all", "draw_grid"]

_TILE = 128
"""Pixels that a picture's sides get at least."""


def draw_all(evidence: Evidence, measured: Measured, page: Path) -> list[Path]:
    """Draw what there is into files named after the page.

    Returns:
        What was written.
    """

    def path(what: str) -> Path:
        return page.with_name(f"{page.stem}-{what}.png")

    written = []
    if measured.pictures:
        draw_grid(measured.prompts, measured.pictures).save(path("pictures"))
        written.append(path("pictures"))
    if evidence.student is not None:
        draw_plan(evidence.student.plan, path("plan"))
        written.append(path("plan"))
        if evidence.student.sensitivity is not None and evidence.student.sensitivity.harms:
            draw_sensitivity(evidence.student.sensitivity, path("sensitivity"))
            written.append(path("sensitivity"))
    return written


def draw_grid(prompts: Sequence[str], pictures: Mapping[str, npt.NDArray[np.uint8]]) -> Image.Image:
    """One row a stage, one column a prompt."""
    scale = max(1, -(-_TILE // next(iter(pictures.values())).shape[1]))
    font = ImageFont.load_default(size=13)
    height, width = (scale * side for side in next(iter(pictures.values())).shape[1:3])
    gap, head, side = 6, 62, 120
    grid = Image.new(
        "RGB", (side + len(prompts) * (width + gap), head + len(pictures) * (height + gap)), "white"
    )
    draw = ImageDraw.Draw(grid)
    for column, prompt in enumerate(prompts):
        lines = _wrap(prompt, width // 7).splitlines()
        draw.multiline_text((side + column * (width + gap), 4), "\n".join(lines[:4]), fill="black", font=font)
    for row, (name, painted) in enumerate(pictures.items()):
        top = head + row * (height + gap)
        draw.multiline_text((4, top + height // 3), _wrap(name, 15), fill="black", font=font)
        for column, picture in enumerate(painted):
            tile = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            grid.paste(tile, (side + column * (width + gap), top))
    return grid


def _wrap(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
