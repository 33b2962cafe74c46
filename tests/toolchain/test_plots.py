"""Sensitivities as pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from toolchain.errors import ToolchainError
from toolchain.geometry import Block, Geometry, Part, Unit
from toolchain.plan import Harm, Sensitivity
from toolchain.plots import draw_sensitivity

COMPONENTS = ("attn", "ff")


def sensitivity(harm: float, *, pairs: bool = False, num_blocks: int = 3) -> Sensitivity:
    """The last block has no feed-forward; the first is harmless."""
    blocks = tuple(
        Block(
            kind="joint",
            components=COMPONENTS[: 2 - (index == num_blocks - 1)],
            parts=tuple(
                Part(name=name, parameters=1, flops=1, zero=((name,),), identity=((name,),))
                for name in COMPONENTS
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
    removed = [(Unit(index),) for index in range(num_blocks)] + [(unit,) for unit in geometry.units]
    if pairs:
        removed += [(Unit(0), Unit(1)), (Unit(0, "attn"), Unit(0, "ff"))]
    return Sensitivity(
        model="toy",
        geometry=geometry,
        semantics="zero",
        metric="velocity",
        baseline=0.0,
        settings={},
        harms=tuple(
            Harm(removed=units, harm=harm * units[0].block, standard_error=abs(harm) / 9) for units in removed
        ),
    )


@pytest.mark.parametrize("harm", [0.5, -0.5, 0.0, 1e-9, 30.0])
@pytest.mark.parametrize("pairs", [False, True])
def test_any_sensitivity_can_be_drawn(harm: float, pairs: bool, tmp_path: Path) -> None:
    draw_sensitivity(sensitivity(harm, pairs=pairs), tmp_path / "harm.png")
    assert (tmp_path / "harm.png").read_bytes().startswith(b"\x89PNG")
    assert pyplot.get_fignums() == []


def test_pairs_are_drawn_beside_the_rest(tmp_path: Path) -> None:
    heights = []
    for pairs in (False, True):
        draw_sensitivity(sensitivity(0.5, pairs=pairs), tmp_path / "harm.png")
        heights.append(pyplot.imread(tmp_path / "harm.png").shape[0])
    assert heights[1] > heights[0]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """All that are saved, in order."""
    found: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **options: Any) -> None:
        found.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return found


def panels(figure: Figure) -> dict[str, Axes]:
    return {axis.get_title(loc="left"): axis for axis in figure.axes}


def test_a_figure_belongs_to_no_window(figures: list[Figure], tmp_path: Path) -> None:
    draw_sensitivity(sensitivity(0.5), tmp_path / "harm.png")
    assert type(figures[0].canvas) is FigureCanvasAgg


def test_a_component_that_a_block_has_not_is_hatched(figures: list[Figure], tmp_path: Path) -> None:
    draw_sensitivity(sensitivity(0.5), tmp_path / "harm.png")
    hatched = {
        title: [patch.get_x() + 0.5 for patch in axis.patches if patch.get_hatch()]
        for title, axis in panels(figures[0]).items()
        if title in ("whole block", "attention", "MLP")
    }
    assert hatched == {"whole block": [], "attention": [], "MLP": [2]}


def test_bars_are_as_high_as_the_harm_and_of_another_colour_below_zero(
    figures: list[Figure], tmp_path: Path
) -> None:
    draw_sensitivity(sensitivity(-0.5), tmp_path / "harm.png")
    bars = panels(figures[0])["attention"].patches
    assert [bar.get_height() for bar in bars] == [0, -0.5, -1]
    assert len({to_hex(bar.get_facecolor()) for bar in bars[1:]} - {to_hex(bars[0].get_facecolor())}) == 1


def test_harms_of_many_sizes_are_drawn_on_a_logarithmic_scale(figures: list[Figure], tmp_path: Path) -> None:
    like = sensitivity(0.5)
    one, *others = like.harms
    far = replace(like, harms=(replace(one, harm=1e4), *others[:-1], replace(others[-1], harm=-0.1)))
    for item in (like, far):
        draw_sensitivity(item, tmp_path / "harm.png")
    scales = [{panels(figure)[name].get_yscale() for name in ("attention", "MLP")} for figure in figures]
    assert scales == [{"linear"}, {"symlog"}]


def test_an_analysis_that_removed_nothing_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="there is no harm to draw"):
        draw_sensitivity(replace(sensitivity(0.5), harms=()), tmp_path / "harm.png")
