"""A plan as a picture: every block a column, every component a cell, in the terminal or as a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from toolchain.errors import ToolchainError
from toolchain.geometry import Size, Unit
from toolchain.plan import EMBEDDERS, HEAD, CompressionPlan
from toolchain.rules import format_units

if TYPE_CHECKING:
    from matplotlib.axes import Axes

State = Literal["full", "strong", "weak", "faint", "frozen", "removed", "absent"]

# Marks differ in shape, and colours in lightness, so that either will do alone.
_LEARNS, _STAYS, _GOES = "#4C9BE8", "bright_black", "bold #E8743B"
_MARKS: dict[State, tuple[str, str, str]] = {
    "full": ("█", "#", _LEARNS),
    "strong": ("▓", "=", _LEARNS),
    "weak": ("▒", "+", _LEARNS),
    "faint": ("░", "-", _LEARNS),
    "frozen": ("·", ".", _STAYS),
    "removed": ("×", "x", _GOES),
    "absent": (" ", " ", ""),
}
"""In Unicode, in ASCII, and the style in a terminal."""
MEANING: dict[State, str] = {
    "full": "learns in full",
    "strong": "at least 1/2",
    "weak": "at least 1/10",
    "faint": "less",
    "frozen": "frozen",
    "removed": "removed",
}
_FILL: dict[State, str] = {
    "full": "#08519C",
    "strong": "#3F8FC5",
    "weak": "#8FC1E3",
    "faint": "#D0E3F4",
    "frozen": "#CFCFCF",
    "removed": "#FCE6D6",
}
_CROSS, _INK = "#C8500A", "#333333"


def state_of(strength: float) -> State:
    """How a part of this update strength is drawn."""
    if strength >= 1:
        return "full"
    if strength >= 0.5:
        return "strong"
    if strength >= 0.1:
        return "weak"
    return "faint" if strength > 0 else "frozen"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Neighbouring blocks of one kind."""

    kind: str
    blocks: range
    rows: dict[str, tuple[State, ...]]
    """By component, the state of every block's; `absent` where a block has none of that name."""


def panels(plan: CompressionPlan) -> tuple[Panel, ...]:
    """The cells of the picture."""
    gone = plan.geometry.components_removed(plan.removed)

    def state(block: int, name: str) -> State:
        if name not in plan.geometry.blocks[block].components:
            return "absent"
        return "removed" if name in gone.get(block, ()) else state_of(plan.strength_of(f"{block}.{name}"))

    result = []
    for kind, run in groupby(enumerate(plan.geometry.blocks), key=lambda item: item[1].kind):
        members = list(run)
        blocks = range(members[0][0], members[-1][0] + 1)
        names = dict.fromkeys(name for _, block in members for name in block.components)
        rows = {name: tuple(state(block, name) for block in blocks) for name in names}
        result.append(Panel(kind=kind, blocks=blocks, rows=rows))
    return tuple(result)


def freed(plan: CompressionPlan) -> list[tuple[Unit, Size]]:
    """What each removal frees, given those before it."""
    geometry, semantics = plan.geometry, plan.semantics
    left = [geometry.remaining(plan.removed[:n], semantics) for n in range(len(plan.removed) + 1)]
    return [
        (unit, Size(parameters=was.parameters - now.parameters, flops=was.flops - now.flops))
        for unit, was, now in zip(plan.removed, left[:-1], left[1:], strict=True)
    ]


# In the terminal


def render_plan(plan: CompressionPlan) -> RenderableType:
    """For `rich`; as wide as the console is, and in ASCII where it knows nothing more."""
    return _Picture(plan)


@dataclass(frozen=True)
class _Picture:
    plan: CompressionPlan

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        plan, ascii_only = self.plan, options.ascii_only
        yield Text(_title(plan), style="bold")
        yield Text()
        yield from _cells(plan, options.max_width, ascii_only)
        yield _legend(ascii_only)
        yield Text()
        yield _totals(plan)
        if plan.removed:
            yield Text()
            yield _removals(plan)


def _cells(plan: CompressionPlan, width: int, ascii_only: bool) -> Iterator[Text]:
    drawn = panels(plan)
    margin = 2 + max(len(text) for panel in drawn for text in (EMBEDDERS, panel.kind, *panel.rows))
    longest = max(len(panel.blocks) for panel in drawn)
    step = 2 if margin + 2 * longest <= width else 1
    at_once = max(10, (width - margin) // step)
    ends = {
        name: Text(name.ljust(margin)).append(*_mark(state_of(plan.strength_of(name)), ascii_only))
        for name in (EMBEDDERS, HEAD)
    }
    yield ends[EMBEDDERS]
    yield Text()
    for panel in drawn:
        for start in range(0, len(panel.blocks), at_once):
            blocks = panel.blocks[start : start + at_once]
            yield Text(panel.kind.ljust(margin) + _ruler(blocks, step), style="dim")
            for name, states in panel.rows.items():
                line = Text(name.ljust(margin))
                for state in states[start : start + at_once]:
                    line.append(*_mark(state, ascii_only)).append(" " * (step - 1))
                yield line
            yield Text()
    yield ends[HEAD]
    yield Text()


def _ruler(blocks: range, step: int) -> str:
    """The number of the first block and of every fifth, each above its column, where there is room."""
    line = ""
    for at, block in enumerate(blocks):
        if at == 0 or (block % 5 == 0 and len(line) < at * step):
            line = line.ljust(at * step) + str(block)
    return line


def _mark(state: State, ascii_only: bool) -> tuple[str, str]:
    mark, plain, style = _MARKS[state]
    return plain if ascii_only else mark, style


def _legend(ascii_only: bool) -> Text:
    line = Text()
    for state, meaning in MEANING.items():
        line.append(*_mark(state, ascii_only)).append(f" {meaning}   ")
    return line


def _totals(plan: CompressionPlan) -> Table:
    table = _table("", "parameters", "at 16 bits", "at 4 bits", "FLOPs a pass")
    before, after = (tuple(row.values()) for row in plan.sizes.values())
    for when, (parameters, wide, narrow, flops) in (("before", before), ("after", after)):
        table.add_row(when, _number(parameters), _bytes(wide), _bytes(narrow), _number(flops))
    shares = (_percent(was - now, was) for was, now in zip(before, after, strict=True))
    table.add_row("removed", *shares, style="bold")
    return table


def _removals(plan: CompressionPlan) -> Table:
    """In the order of removal, down the left half and then down the right."""
    items, whole = freed(plan), plan.geometry.size
    halves = 2 if len(items) > 4 else 1
    height = -(-len(items) // halves)
    table = _table(*(("removed", "of parameters", "of FLOPs") * halves))
    for row in range(height):
        cells: list[str] = []
        for unit, size in items[row::height]:
            cells += (
                str(unit),
                _percent(size.parameters, whole.parameters),
                _percent(size.flops, whole.flops),
            )
        table.add_row(*cells)
    return table


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in headings:
        left = heading in ("", "removed")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    return table


def _title(plan: CompressionPlan) -> str:
    units = format_units(plan.removed).replace(",", ", ") or "nothing"
    return f"{plan.model}: {plan.rule} removes {units}"


def _number(value: int, giga: str = "B") -> str:
    for power, letter in ((12, "T"), (9, giga), (6, "M"), (3, "k")):
        if value >= 10**power:
            scaled = value / 10**power
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {letter}"
    return f"{value} "


def _bytes(value: int) -> str:
    return f"{_number(value, 'G')}B"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.1f} %"


# As a file


def draw_plan(plan: CompressionPlan, path: Path) -> None:
    """Draw the same picture, as a PNG, SVG or PDF file.

    Raises:
        ToolchainError: The name ends in none of these.
    """
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ToolchainError(f"cannot draw {path}: its name has to end in .png, .svg or .pdf")

    # Not pyplot: a figure of our own leaves alone whatever backend the caller uses.
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    drawn = panels(plan)
    # All in inches.
    width, label, gap, bottom = 12.0, 1.15, 0.15, 2.6
    num_blocks = sum(len(panel.blocks) for panel in drawn)
    cell = min(0.34, (width - 0.3 - len(drawn) * (label + gap)) / num_blocks)
    row = max(cell, 0.2)
    cells = row * max(len(panel.rows) for panel in drawn)
    height = bottom + cells + 1.35
    figure = Figure(figsize=(width, height), facecolor="white")

    left = label
    for panel in drawn:
        across, down = cell * len(panel.blocks), row * len(panel.rows)
        place = (left, bottom + 0.25 + cells - down, across, down)
        axes = figure.add_axes(_inches(place, width, height))
        _draw_panel(axes, panel, marker=0.5 * 72 * min(cell, row))
        left += across + gap + label

    figure.text(
        0.15 / width, 1 - 0.15 / height, _title(plan), fontsize=11, weight="bold", va="top", wrap=True
    )
    figure.legend(
        handles=[
            Patch(facecolor=_FILL[state], edgecolor=_CROSS if state == "removed" else "none", label=meaning)
            for state, meaning in MEANING.items()
        ],
        loc="upper left",
        bbox_to_anchor=(0.08 / width, 1 - 0.45 / height),
        ncols=len(MEANING),
        frameon=False,
        fontsize=8.5,
    )
    _draw_totals(figure.add_axes(_inches((label, 0.75, 3.9, 1.4), width, height)), plan)
    if plan.removed:
        _draw_freed(
            figure.add_axes(_inches((label + 5.0, 0.75, width - label - 5.3, 1.4), width, height)), plan
        )
    figure.savefig(path, dpi=150)


def _inches(
    place: tuple[float, float, float, float], width: float, height: float
) -> tuple[float, float, float, float]:
    return place[0] / width, place[1] / height, place[2] / width, place[3] / height


def _draw_panel(axes: Axes, panel: Panel, *, marker: float) -> None:
    from matplotlib.patches import Rectangle

    start = panel.blocks.start
    for down, states in enumerate(panel.rows.values()):
        for block, state in zip(panel.blocks, states, strict=True):
            if state != "absent":
                axes.add_patch(Rectangle((block - 0.44, down - 0.44), 0.88, 0.88, facecolor=_FILL[state]))
            if state == "removed":
                axes.plot(block, down, marker="x", color=_CROSS, markersize=marker, markeredgewidth=1.4)
    axes.set_xlim(start - 0.5, panel.blocks.stop - 0.5)
    axes.set_ylim(len(panel.rows) - 0.5, -0.5)
    axes.set_yticks(range(len(panel.rows)), list(panel.rows), fontsize=8.5)
    ticks = [block for block in panel.blocks if block == start or (block % 5 == 0 and block - start > 1)]
    axes.set_xticks(ticks, list(map(str, ticks)), fontsize=8.5)
    axes.set_title(f"{panel.kind} blocks", fontsize=9, loc="left", color=_INK)
    _clean(axes)


def _draw_totals(axes: Axes, plan: CompressionPlan) -> None:
    before, after = plan.sizes["before"], plan.sizes["after"]
    texts = []
    for down, key in enumerate(before):
        write = _bytes if key.startswith("bytes") else _number
        share = after[key] / before[key]
        axes.barh(down, 1, color=_FILL["frozen"], height=0.7)
        axes.barh(down, share, color=_FILL["strong"], height=0.7)
        texts.append(
            f"{write(before[key])} → {write(after[key])}   −{_percent(before[key] - after[key], before[key])}"
        )
        axes.text(0.02, down, texts[-1], va="center", fontsize=8.5, color="white", weight="bold")
    axes.set_yticks(range(4), ["parameters", "at 16 bits", "at 4 bits", "FLOPs"], fontsize=8.5)
    axes.set_ylim(3.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"], fontsize=8.5)
    axes.set_title("what is left", fontsize=9, loc="left", color=_INK)
    _clean(axes)


def _draw_freed(axes: Axes, plan: CompressionPlan) -> None:
    items, whole = freed(plan), plan.geometry.size
    at = range(len(items))
    parameters = [100 * size.parameters / whole.parameters for _, size in items]
    flops = [100 * size.flops / max(whole.flops, 1) for _, size in items]
    axes.bar([x - 0.2 for x in at], parameters, width=0.38, color=_FILL["strong"], label="parameters")
    axes.bar([x + 0.2 for x in at], flops, width=0.38, color="#E69F00", label="FLOPs")
    axes.set_xticks(list(at), [str(unit) for unit, _ in items], fontsize=8)
    if len(items) > 8 or any(unit.component for unit, _ in items):
        axes.tick_params(axis="x", rotation=90)
    axes.set_xlim(-0.6, max(len(items), 6) - 0.4)
    axes.tick_params(axis="y", labelsize=8.5)
    axes.set_title("what each removal frees, in order, % of the whole", fontsize=9, loc="left", color=_INK)
    axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
    _clean(axes)


def _clean(axes: Axes) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=_INK)
