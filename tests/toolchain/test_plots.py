"""Sensitivities as pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib import pyplot

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
