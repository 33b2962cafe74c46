"""A plan as a picture, in the terminal and as a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib import pyplot
from rich.console import Console

from toolchain.geometry import Block, Geometry, Part, Unit
from toolchain.picture import draw_plan, freed, panels, render_plan
from toolchain.plan import CompressionPlan

SIZES = {"attn": (40, 600), "ff": (30, 300), "norm1": (30, 100)}


def plan(num_blocks: int = 5, **changes: object) -> CompressionPlan:
    """Block 1 has lost its attention and block 2 is gone; what comes before is frozen."""
    blocks = tuple(
        Block(
            kind="joint" if index < num_blocks - 1 else "single",
            components=tuple(SIZES),
            parts=tuple(
                Part(name=name, parameters=parameters, flops=flops, zero=((name,),), identity=((name,),))
                for name, (parameters, flops) in SIZES.items()
            ),
        )
        for index in range(num_blocks)
    )
    geometry = Geometry(
        family="toy",
        blocks=blocks,
        other_parameters=0,
        other_flops=0,
        height=64,
        width=64,
        text_tokens=7,
    )
    strength = {
        "embedders": 0.0,
        "0": 0.0,
        "1": 1.0,
        "3.attn": 0.6,
        "3.ff": 0.2,
        "3.norm1": 0.05,
        "head": 1.0,
    }
    strength |= {str(index): 1.0 for index in range(4, num_blocks)}
    values = {
        "model": "toy",
        "geometry": geometry,
        "semantics": "zero",
        "rule": "manual",
        "removed": (Unit(1, "attn"), Unit(2)),
        "strength": strength,
        "asked": {},
    }
    return CompressionPlan(**(values | changes))  # type: ignore[arg-type]


def shown(what: CompressionPlan, width: int = 100) -> list[str]:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(render_plan(what))
    return capture.get().splitlines()


def row(lines: list[str], name: str) -> str:
    """The cells of the first row of that name, without the gaps between them."""
    (line, *_) = (line for line in lines if line.split(" ")[0] == name)
    return line.removeprefix(name).replace(" ", "")


def test_every_cell_says_without_colour_what_becomes_of_it() -> None:
    lines = shown(plan())
    assert row(lines, "embedders") == "·"
    assert row(lines, "attn") == "·××▓"
    assert row(lines, "ff") == "·█×▒"
    assert row(lines, "norm1") == "·█×░"
    assert row(lines, "head") == "█"
    legend = "\n".join(lines)
    assert all(word in legend for word in ("learns in full", "at least 1/2", "less", "frozen", "removed"))


def test_blocks_of_another_kind_have_a_panel_of_their_own() -> None:
    assert [(panel.kind, len(panel.blocks)) for panel in panels(plan())] == [("joint", 4), ("single", 1)]


def test_the_footer_tells_what_is_left_and_what_each_removal_frees() -> None:
    what = plan()
    text = "\n".join(shown(what))
    # 500 parameters and 5,000 FLOPs before; 40 and 600 go with the attention, 100 and 1,000 with the block.
    before, after = (
        next(line for line in text.splitlines() if line.startswith(name)) for name in ("before", "after")
    )
    assert before.split() == ["before", "500", "1.00", "kB", "250", "B", "5.00", "k"]
    assert after.split() == ["after", "360", "720", "B", "180", "B", "3.40", "k"]
    assert [(str(unit), size.parameters, size.flops) for unit, size in freed(what)] == [
        ("1.attn", 40, 600),
        ("2", 100, 1000),
    ]


@pytest.mark.parametrize("num_blocks", [5, 24, 57])
@pytest.mark.parametrize("width", [80, 100])
def test_no_line_is_wider_than_the_terminal_and_no_number_is_cut(num_blocks: int, width: int) -> None:
    lines = shown(plan(num_blocks), width)
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)


def test_a_file_is_written_and_no_figure_left_open(tmp_path: Path) -> None:
    for num_blocks in (5, 57):
        path = tmp_path / f"{num_blocks}.png"
        draw_plan(plan(num_blocks), path)
        assert path.read_bytes().startswith(b"\x89PNG")
    assert pyplot.get_fignums() == []
