"""Pictures of an analysis: what each block and component is worth, and what harms together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from toolchain.errors import ToolchainError
from toolchain.geometry import Unit
from toolchain.plan import Harm, Sensitivity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's, which people of any colour vision tell apart.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#e6e6e6"
_COLOR_MAP = "cividis"
_NAMES = {
    "attn": "attention",
    "attn2": "second attention",
    "ff": "MLP",
    "ff_context": "context MLP",
    "norm1": "modulation",
    "norm1_context": "context modulation",
    "norm": "modulation",
    "mlp": "MLP",
}
# Harms that reach further than this above their median are drawn on a logarithmic scale.
_LOG_RANGE = 10.0
# How far below the greatest harm bars and colours still tell harms apart.
_BAR_RANGE, _MAP_RANGE = 1e4, 1e6


def draw_sensitivity(sensitivity: Sensitivity, path: Path) -> None:
    """Draw bars of harm by block and by component, a map of both, and the pairs that were measured.

    Args:
        sensitivity: What to draw.
        path: A PNG, SVG or PDF file.

    Raises:
        ToolchainError: Nothing was measured.
    """
    harms = {item.removed: item for item in sensitivity.harms}
    num_blocks = len(sensitivity.geometry.blocks)
    # What joint and single blocks call differently but does the same shares a panel.
    components = list(dict.fromkeys(component_name(item[0].component) for item in harms if item[0].component))
    if not harms:
        raise ToolchainError("there is no harm to draw: nothing was removed in this analysis")

    # Not pyplot: figures of our own leave alone whatever backend the caller uses.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pairs = [item for item in harms if len(item) == 2]
    neighbours = [item for item in pairs if item[0].component is None]
    within = [item for item in pairs if item[0].component is not None]
    width = min(20.0, max(9.0, 0.32 * num_blocks + 2.5))
    panels = [None, *components]
    heights = [2.4, *(1.35 for _ in components)]
    if components:
        heights.append(0.9 + 0.3 * (len(components) + 1))
    if neighbours:
        heights.append(1.9)
    kinds = list(dict.fromkeys(block.kind for block in sensitivity.geometry.blocks)) if within else []
    heights += [0.9 + 0.26 * len(_pairs_of(sensitivity, within, kind)) for kind in kinds]
    figure = Figure(figsize=(width, sum(heights) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{sensitivity.model}: harm of removal by {sensitivity.metric}, {sensitivity.semantics} semantics; "
        f"whole model: {sensitivity.baseline:.3g}",
        fontsize=11,
    )
    axes: list[Axes] = list(np.atleast_1d(figure.subplots(len(heights), 1, height_ratios=heights)))
    scale = _Scale(harms.values())
    for component, axis in zip(panels, axes, strict=False):
        _bars(axis, _row(sensitivity, component), component or "whole block", scale)
    rest = axes[len(panels) :]
    if components:
        rows = [_row(sensitivity, component) for component in panels]
        _map(figure, rest.pop(0), rows, ["whole block", *components], "all of the above", scale)
    if neighbours:
        found = [harms.get((Unit(index), Unit(index + 1))) for index in range(num_blocks - 1)]
        _bars(rest.pop(0), found, "a block and the next", scale)
    for kind in kinds:
        names_of_pairs = _pairs_of(sensitivity, within, kind)
        rows = [
            [harms.get((Unit(index, first), Unit(index, second))) for index in range(num_blocks)]
            for first, second in names_of_pairs
        ]
        _map(
            figure,
            rest.pop(0),
            rows,
            [f"{component_name(first)} + {component_name(second)}" for first, second in names_of_pairs],
            f"two components of a {kind} block",
            scale,
        )
    figure.savefig(path, dpi=120)


def _row(sensitivity: Sensitivity, name: str | None) -> list[Harm | None]:
    """By block: the harm of removing it, or its component of a name as drawn; None where there is none."""
    found: list[Harm | None] = [None] * len(sensitivity.geometry.blocks)
    for item in sensitivity.harms:
        component = item.removed[0].component
        if len(item.removed) == 1 and (None if component is None else component_name(component)) == name:
            found[item.removed[0].block] = item
    return found


def _pairs_of(
    sensitivity: Sensitivity, pairs: Sequence[tuple[Unit, ...]], kind: str
) -> list[tuple[str, str]]:
    blocks = sensitivity.geometry.blocks
    found = [
        (str(pair[0].component), str(pair[1].component))
        for pair in pairs
        if blocks[pair[0].block].kind == kind
    ]
    return list(dict.fromkeys(found))


def component_name(component: str) -> str:
    """For people; what joint and single blocks call differently but does the same has one name."""
    return _NAMES.get(component, component)


class _Scale:
    """Of all panels alike, so that they compare."""

    def __init__(self, harms: Iterable[Harm]) -> None:
        found = [(item.harm, item.standard_error) for item in harms]
        above = [harm for harm, _ in found if harm > 0]
        self.logarithmic = len(above) > 1 and max(above) > _LOG_RANGE * float(np.median(above))
        self.low = min([0.0, *(harm - error for harm, error in found if harm < 0)])
        # Where nothing harms at all, any height will do for bars of none.
        self.high = max([0.0, *(harm + error for harm, error in found)]) or 1.0 * (self.low == 0)
        self.least = min((harm for harm, _ in found), default=0.0)
        self.above = (min(above), max(above)) if above else (0.0, 0.0)


def _bars(axis: Any, found: Sequence[Harm | None], name: str, scale: _Scale) -> None:
    """Harm by block; what was not measured or is not there is marked as such."""
    present = [(index, item) for index, item in enumerate(found) if item is not None]
    index = [position for position, _ in present]
    harm = np.array([item.harm for _, item in present])
    error = np.array([item.standard_error for _, item in present])
    colors = [_ORANGE if value < 0 else _BLUE for value in harm]
    axis.bar(index, harm, yerr=error, color=colors, ecolor="black", error_kw={"elinewidth": 0.8}, width=0.8)
    if scale.logarithmic:
        # Linear about zero, for scores may rise and errors be tiny.
        axis.set_yscale("symlog", linthresh=10.0 ** math.floor(math.log10(scale.high / _BAR_RANGE)))
    axis.set_ylim(scale.low * 1.2, scale.high * (1.5 if scale.logarithmic else 1.05))
    axis.axhline(0, color="black", linewidth=0.6)
    for position, item in enumerate(found):
        if item is None:
            left, right = position - 0.5, position + 0.5
            axis.axvspan(left, right, facecolor=_GREY, hatch="///", edgecolor="white", lw=0)
    axis.set_title(name, fontsize=9, loc="left", pad=3)
    axis.set_ylabel("harm", fontsize=8)
    _ticks(axis, len(found))


def _map(
    figure: Any,
    axis: Any,
    rows: Sequence[Sequence[Harm | None]],
    names: Sequence[str],
    title: str,
    scale: _Scale,
) -> None:
    """Harm by row and block as colour; cells of what is not there are hatched."""
    from matplotlib.colors import LogNorm, Normalize

    values: npt.NDArray[np.float64] = np.array(
        [[np.nan if item is None else item.harm for item in row] for row in rows]
    )
    norm: Normalize
    if scale.logarithmic:
        # What is harmless or less takes the colour of the least harm.
        least = max(scale.above[0], scale.above[1] / _MAP_RANGE)
        norm = LogNorm(least, scale.above[1], clip=True)
        values = np.where(values <= 0, least, values)
    else:
        norm = Normalize(min(0.0, scale.least), scale.above[1])
    axis.set_facecolor(_GREY)
    axis.patch.set_hatch("////")
    axis.patch.set_edgecolor("#b0b0b0")
    image = axis.imshow(np.ma.masked_invalid(values), aspect="auto", cmap=_COLOR_MAP, norm=norm)
    figure.colorbar(image, ax=axis, pad=0.01, label="harm")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_title(title, fontsize=9, loc="left", pad=3)
    _ticks(axis, values.shape[1])


def _ticks(axis: Any, num_blocks: int) -> None:
    step = 1 if num_blocks <= 40 else 2
    axis.set_xticks(range(0, num_blocks, step))
    axis.tick_params(axis="x", labelsize=7)
    axis.set_xlim(-0.5, num_blocks - 0.5)
    axis.tick_params(axis="y", labelsize=8)
