"""Numbers as places on a chart, in percent of its width and height; the template draws them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from toolchain.geometry import Unit
from toolchain.picture import State, panels
from toolchain.plan import CompressionPlan, Sensitivity
from toolchain.plots import component_name

__all__ = ["Bar", "Dots", "Lines", "Panel", "Series", "bars", "dots", "harm_panels", "lines", "plan_panels"]

_MOST_POINTS = 400
"""Of a line; more of them no screen shows."""
_LABEL_ROOM = 9.0
"""Percent of the height that the name of a line takes."""
_HARM_RANGE = 1e4
"""How far below the greatest harm colours still tell harms apart."""


class Tick(NamedTuple):
    """A mark on an axis."""

    at: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar from zero, with its value written beside it."""

    name: str
    tone: int
    """Number of the stage, which has a colour of its own."""
    share: float
    text: str
    reach: float | None = None
    """Where a whisker ends that starts at the bar's end."""


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A value with its error."""

    name: str
    tone: int
    at: float
    low: float
    high: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Dots:
    """Values on one axis, which need not start at zero."""

    rows: list[Dot]
    ticks: list[Tick]


class Series(NamedTuple):
    """A line of a chart before it is drawn."""

    name: str
    tone: int
    points: Sequence[tuple[float, float]]
    faint: bool = False


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line, as the `d` of an SVG path in a box of 100 x 100."""

    name: str
    tone: int
    path: str
    marks: str
    """Of its points, where they are few enough to be told apart; else empty."""
    faint: bool
    label_at: float


@dataclass(frozen=True, kw_only=True)
class Lines:
    """A chart of lines."""

    title: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_name: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One component of one block."""

    state: State
    heat: float = 0.0
    """From 0, harmless, to 1."""
    gone: bool = False
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Neighbouring blocks of one kind."""

    kind: str
    heads: list[str]
    rows: list[tuple[str, list[Cell]]]


def bars(items: Iterable[tuple[str, int, float, str, float | None]]) -> list[Bar]:
    """Bars on one scale, from names, tones, values, texts and where whiskers end."""
    given = list(items)
    most = max((max(value, reach or 0.0) for _, _, value, _, reach in given), default=0.0) or 1.0
    return [
        Bar(
            name=name,
            tone=tone,
            share=100 * value / most,
            text=text,
            reach=None if reach is None else 100 * reach / most,
        )
        for name, tone, value, text, reach in given
    ]


def dots(items: Iterable[tuple[str, int, float, float, str]], *, most: float = math.inf) -> Dots:
    """Values on an axis around them, from names, tones, values, errors and texts.

    Args:
        items: One a row.
        most: What no value can exceed, so that the axis ends there.
    """
    given = list(items)
    low = min(value - error for _, _, value, error, _ in given)
    high = max(value + error for _, _, value, error, _ in given)
    room = (high - low) * 0.1 or 0.05
    ticks = _ticks(max(0.0, low - room), min(most, high + room))
    start, end = ticks[0], min(most, ticks[-1])

    def place(value: float) -> float:
        return 100 * (min(max(value, start), end) - start) / (end - start)

    rows = [
        Dot(
            name=name,
            tone=tone,
            at=place(value),
            low=place(value - error),
            high=place(value + error),
            text=text,
        )
        for name, tone, value, error, text in given
    ]
    return Dots(rows=rows, ticks=[Tick(place(tick), f"{tick:g}") for tick in ticks if tick <= end])


def lines(title: str, series: Sequence[Series], *, x_name: str, log: bool = False) -> Lines:
    """A chart of lines.

    Args:
        title: What is drawn.
        series: One point at least; on a logarithmic scale those not above zero are left out.
        x_name: Of the horizontal axis.
        log: Whether the vertical axis is logarithmic.
    """
    if log:
        series = [item._replace(points=[(x, y) for x, y in item.points if y > 0]) for item in series]
    values = [y for item in series for _, y in item.points]
    across = [x for item in series for x, _ in item.points]
    left, right = min(across), max(across)
    if log:
        marks = [10.0**power for power in _powers(min(values), max(values))]
        scale = math.log10
    else:
        marks = _ticks(min(0.0, *values), max(values))
        scale = float
    bottom, top = scale(marks[0]), scale(marks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            100 * (x - left) / ((right - left) or 1.0),
            100 - 100 * (min(max(scale(y), bottom), top) - bottom) / ((top - bottom) or 1.0),
        )

    drawn = []
    for item in series:
        points = [place(x, y) for x, y in _thinned(item.points)]
        if not points:
            continue
        drawn.append(
            Line(
                name=item.name,
                tone=item.tone,
                path="M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points),
                marks="".join(f"M{x:.2f} {y:.2f}h0" for x, y in points) if len(points) <= 40 else "",
                faint=item.faint,
                label_at=points[-1][1],
            )
        )
    return Lines(
        title=title,
        lines=_apart(drawn),
        x_ticks=[Tick(place(x, marks[0] if log else bottom)[0], f"{x:g}") for x in _whole_ticks(left, right)],
        y_ticks=[Tick(place(left, mark)[1], f"{mark:g}") for mark in marks],
        x_name=x_name,
    )


def plan_panels(plan: CompressionPlan) -> list[Panel]:
    """What goes and what learns."""
    return [
        Panel(
            kind=panel.kind,
            heads=_heads(panel.blocks),
            rows=[
                (
                    component_name(name),
                    [
                        Cell(state=state, text=f"{block}.{name}: {state}")
                        for block, state in zip(panel.blocks, states, strict=True)
                    ],
                )
                for name, states in panel.rows.items()
            ],
        )
        for panel in panels(plan)
    ]


def harm_panels(sensitivity: Sensitivity, plan: CompressionPlan) -> list[Panel]:
    """How much each part matters, on a logarithmic scale, in the places that the plan's picture has them."""
    harms = {item.removed[0]: item for item in sensitivity.harms if len(item.removed) == 1}
    most = max((item.harm for item in harms.values()), default=0.0)
    removed = plan.geometry.components_removed(plan.removed)

    def cell(block: int, name: str | None) -> Cell:
        unit = Unit(block, name)
        if (item := harms.get(unit)) is None:
            return Cell(state="absent", text=f"{unit}: not measured")
        heat = 0.0
        if item.harm > 0:
            heat = max(0.0, 1 + math.log10(item.harm / most) / math.log10(_HARM_RANGE))
        names = plan.geometry.blocks[block].components if name is None else (name,)
        gone = set(names) <= removed.get(block, frozenset())
        text = f"{unit}: {item.harm:.3g} ± {item.standard_error:.2g}" + (", removed" if gone else "")
        return Cell(state="full", heat=heat, gone=gone, text=text)

    result = []
    for panel in panels(plan):
        names = [
            None,
            *(name for name in panel.rows if any((Unit(at, name) in harms) for at in panel.blocks)),
        ]
        result.append(
            Panel(
                kind=panel.kind,
                heads=_heads(panel.blocks),
                rows=[
                    (
                        "whole block" if name is None else component_name(name),
                        [cell(block, name) for block in panel.blocks],
                    )
                    for name in names
                ],
            )
        )
    return result


def _heads(blocks: range) -> list[str]:
    """The number of the first block and of every fifth."""
    near = 2
    return [
        str(block) if block == blocks.start or (block % 5 == 0 and block - blocks.start > near) else ""
        for block in blocks
    ]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most so many, each the mean of its neighbours."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    pieces = np.array_split(np.array(points), _MOST_POINTS)
    return [(float(x), float(y)) for x, y in (piece.mean(axis=0) for piece in pieces)]


def _apart(drawn: Sequence[Line]) -> list[Line]:
    """Names of lines that end close to each other, moved until they can be read."""
    result: list[Line] = []
    last = -_LABEL_ROOM
    named = sorted((line for line in drawn if line.name), key=lambda line: line.label_at)
    room = min(_LABEL_ROOM, 100 / max(len(named), 1))
    for index, line in enumerate(named):
        # What still has to come below needs its room too.
        at = min(max(line.label_at, last + room), 100 - room * (len(named) - 1 - index))
        result.append(Line(**{**line.__dict__, "label_at": at}))
        last = at
    return [*(line for line in drawn if not line.name), *result]


def _powers(low: float, high: float) -> range:
    """Of ten, around what is drawn; not so many that they would not be read."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    step = -(-(last - first) // 5)
    return range(first, first + step * -(-(last - first) // step) + 1, step)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers around what is drawn, three to seven."""
    span = (high - low) or abs(high) or 1.0
    unit = 10.0 ** math.floor(math.log10(span))
    step = next(unit * factor for factor in (0.2, 0.5, 1.0, 2.0) if span / (unit * factor) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(at * step, 12) for at in range(first, max(last, first + 1) + 1)]


def _whole_ticks(left: float, right: float) -> list[float]:
    ticks = [tick for tick in _ticks(left, right) if left <= tick <= right]
    return ticks or [left]
