"""Which units go, and in which order: the rules, and the budget at which they stop. Pure; no torch.

Hierarchical position pruning follows HierarchicalPrune (arXiv 2508.04663): a unit's score is the harm of
removing it, weighted by where it stands, since early blocks lay out the picture and late ones refine it.
As transcribed, the paper's weight exp((i - n) / n) grows with the position i and favours removing the
early blocks that its text protects; `late`, the default, is exp(-i / n), which does what the text says:
of two blocks whose removal harms alike, the later one goes first.

Every rule yields units one by one and `build_plan` stops it as soon as the budget is met. No rule looks
back for a smaller removal that would meet the budget more tightly.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from toolchain.errors import ToolchainError
from toolchain.geometry import Geometry, Semantics, Size, Unit
from toolchain.plan import (
    CompressionPlan,
    RuleName,
    Sensitivity,
    StrengthMode,
    check_distinct,
    strengths,
    transformer_bytes,
)

PositionWeight = Literal["late", "paper", "none"]
Grain = Literal["blocks", "components"]
Rescore = Callable[[tuple[Unit, ...], Sequence[Unit]], Mapping[Unit, float]]
"""What the removal of each of some units would add to the harm, given what is removed already."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """When enough is removed; exactly one of the three is given."""

    ratio: float | None = None
    """Share of the transformer's parameters to remove, at least."""
    max_bytes: int | None = None
    """What the transformer's weights may take, at `bits` each."""
    bits: float = 16
    """Per weight; counts for `max_bytes` alone."""
    max_flops: float | None = None
    """Share of the transformer's FLOPs that may stay. Norms and the text stream hold next to none of them."""

    def __post_init__(self) -> None:
        given = {name: value for name, value in self.asked.items() if name != "bits"}
        if len(given) != 1:
            raise ToolchainError(
                "a budget is one of ratio, max_bytes and max_flops, not "
                f"{' and '.join(given) or 'none of them'}"
            )
        for name in ("ratio", "max_flops"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ToolchainError(f"{name} {value} is out of range; it is a share between 0 and 1")
        if self.max_bytes is not None and not self.max_bytes > 0:
            raise ToolchainError(f"max_bytes is {self.max_bytes}; it is a number of bytes above 0")
        if not 0 < self.bits <= 32:
            raise ToolchainError(f"bits is {self.bits}; a weight has more than 0 and at most 32")

    @property
    def asked(self) -> dict[str, float]:
        """What was given, by name."""
        values: dict[str, float | None] = {
            "ratio": self.ratio,
            "max_bytes": self.max_bytes,
            "bits": None if self.max_bytes is None else self.bits,
            "max_flops": self.max_flops,
        }
        return {name: value for name, value in values.items() if value is not None}

    def cost(self, size: Size) -> int:
        """What the budget counts: FLOPs for `max_flops`, parameters otherwise."""
        return size.parameters if self.max_flops is None else size.flops

    def limit(self, geometry: Geometry) -> int:
        """The most that may stay, counted as `cost` does."""
        total = self.cost(geometry.size)
        # A share of a large number is inexact; a part in 10^12 either way decides nothing.
        if self.ratio is not None:
            return total - math.ceil(self.ratio * total * (1 - 1e-12))
        if self.max_flops is not None:
            return math.floor(self.max_flops * total * (1 + 1e-12))
        assert self.max_bytes is not None
        return math.floor(self.max_bytes * 8 / self.bits)

    def eased(self, share: float, geometry: Geometry) -> Budget:
        """One that removes only a share of what this one does."""
        if self.ratio is not None:
            return replace(self, ratio=share * self.ratio)
        if self.max_flops is not None:
            return replace(self, max_flops=1 - share * (1 - self.max_flops))
        total = self.cost(geometry.size)
        stays = total - share * (total - self.limit(geometry))
        return replace(self, max_bytes=math.ceil(stays * self.bits / 8))

    def needed(self, geometry: Geometry) -> float:
        """The share that has to go: `ratio`, or what amounts to it; of FLOPs for `max_flops`."""
        return self.ratio or 1 - self.limit(geometry) / self.cost(geometry.size)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a rule can be told; each field says which rules hear it."""

    position_weight: PositionWeight | None = None
    """`hpp`, `hpp-iterative`: the weight of block i of n is exp(-i/n) for `late`, exp((i-n)/n) for `paper`,
    as it is transcribed, and 1 for `none`. None is the rule's own: `late` for `hpp`, `none` for the other."""
    protect_first: int | None = None
    """`hpp`, `hpp-iterative`: number of blocks at the start of which nothing goes. None is the rule's own: 2
    for `hpp`, 0 for `hpp-iterative`, which measures what the other has to assume."""
    protect_last: int | None = None
    """`hpp`, `hpp-iterative`: the same at the end; 1 and 0."""
    threshold: float = 0.25
    """`hpp`: below this share only whole blocks go; from it on, whole blocks until it is gone and then
    components of the others."""
    per_parameter: bool = False
    """`hpp`: divide the score of a component by what its removal frees: parameters, or FLOPs where the budget
    is of FLOPs. `hpp-iterative` always does."""
    grain: Grain = "components"
    """`hpp-iterative`: what it removes."""
    seed: int = 0
    """`random`."""
    units: tuple[Unit, ...] = ()
    """`manual`: what goes."""
    rescore: Rescore | None = None
    """`hpp-iterative`: measures again after each removal; the first relies on the analysis."""
    power: float = 0.5
    """Of the update strengths, see `strengths`."""
    floor: float = 0.0
    """The same."""

    def __post_init__(self) -> None:
        for name, choices in (("position_weight", PositionWeight), ("grain", Grain)):
            if getattr(self, name) not in (None, *get_args(choices)):
                raise ToolchainError(
                    f"{name} is {getattr(self, name)!r}; there are {', '.join(get_args(choices))}"
                )
        if min(self.protect_first or 0, self.protect_last or 0) < 0 or not 0 <= self.threshold <= 1:
            raise ToolchainError(
                f"protect_first is {self.protect_first}, protect_last {self.protect_last} and threshold "
                f"{self.threshold}; the first two are numbers of blocks, the last is a share from 0 to 1"
            )


_DEFAULTS = Options()


def build_plan(
    sensitivity: Sensitivity,
    budget: Budget | None = None,
    *,
    rule: RuleName = "hpp",
    options: Options = _DEFAULTS,
    mode: StrengthMode = "pwp",
    semantics: Semantics | None = None,
) -> CompressionPlan:
    """Decide what goes and how strongly the rest may be updated.

    Args:
        sensitivity: The analysis; `unmeasured` will do for `manual` and `random`.
        budget: When enough is removed; None for `manual` alone, which names what goes.
        rule: One of `RULES`.
        options: For the rule.
        mode: Of the update strengths.
        semantics: What a removal is to mean; None takes what was analysed.

    Raises:
        ToolchainError: Rule or mode is unknown, the budget cannot be met or nothing need go, the analysis
            does not say what the rule needs, or is of other semantics.
    """
    check_rule(rule, budget)
    geometry = sensitivity.geometry
    if semantics not in (None, sensitivity.semantics):
        raise ToolchainError(
            f"the analysis of {sensitivity.model} is of {sensitivity.semantics} semantics, the plan is to be "
            f"of {semantics}; analyse the model again with {semantics}, or plan with {sensitivity.semantics}"
        )
    order = RULES[rule](sensitivity, budget, options)
    if budget is None:
        removed = tuple(order)
        if not removed:
            raise ToolchainError("nothing is named to be removed; give units like 25-28,13.ff")
        check_distinct(removed)
    else:
        check_budget(geometry, sensitivity.semantics, budget, rule=rule, options=options)
        removed = _until_met(order, sensitivity, budget, rule, options)
    removed = whole_blocks(geometry, removed)
    asked: dict[str, object] = {"strengths": mode}
    asked |= {"units": format_units(options.units)} if budget is None else budget.asked
    for field in fields(Options):
        value = getattr(options, field.name)
        if field.name not in ("rescore", "units") and value != field.default:
            asked[field.name] = value
    return CompressionPlan(
        model=sensitivity.model,
        geometry=geometry,
        semantics=sensitivity.semantics,
        rule=rule,
        removed=removed,
        strength=strengths(sensitivity, removed, mode, power=options.power, floor=options.floor),
        asked=asked,
    )


def check_rule(rule: str, budget: Budget | None) -> None:
    """Refuse an unknown rule, `manual` with a budget and any other without.

    Raises:
        ToolchainError: It is one of these.
    """
    if rule not in RULES:
        raise ToolchainError(f"unknown rule {rule!r}; there are {', '.join(RULES)}")
    if rule == "manual" and budget is not None:
        raise ToolchainError(
            "the rule manual removes what it is told to, so it takes no budget; leave one out"
        )
    if rule != "manual" and budget is None:
        raise ToolchainError(f"the rule {rule} needs a budget: ratio, max_bytes or max_flops")


def check_budget(
    geometry: Geometry, semantics: Semantics, budget: Budget, *, rule: RuleName, options: Options = _DEFAULTS
) -> None:
    """Refuse, before anything is measured, a budget that no order of removals could meet.

    Raises:
        ToolchainError: The model is within the budget as it is, or would not be when all but one of the units
            that may go are gone.
    """
    check_rule(rule, budget)
    if budget.cost(geometry.size) <= budget.limit(geometry):
        size = transformer_bytes(geometry.size.parameters, budget.bits)
        raise ToolchainError(
            f"nothing needs to go: the transformer takes {size:,} bytes at {budget.bits:g} bits, "
            f"within the {budget.max_bytes:,} asked for"
        )
    blocks = _eligible(geometry, rule, options)
    if rule == "hpp":
        fine = budget.needed(geometry) >= options.threshold
    else:
        fine = rule == "hpp-iterative" and options.grain == "components"
    units = _components(geometry, blocks) if fine else list(map(Unit, blocks))
    best = min(
        (geometry.remaining(units[:at] + units[at + 1 :], semantics) for at in range(len(units))),
        key=budget.cost,
        default=geometry.size,
    )
    if budget.cost(best) > budget.limit(geometry):
        raise _out_of_reach(geometry, budget, rule, options, best)


def _until_met(
    order: Iterable[Unit], sensitivity: Sensitivity, budget: Budget, rule: RuleName, options: Options
) -> tuple[Unit, ...]:
    geometry, semantics = sensitivity.geometry, sensitivity.semantics
    limit = budget.limit(geometry)
    removed: list[Unit] = []
    met = False
    for unit in order:
        removed.append(unit)
        met = budget.cost(geometry.remaining(removed, semantics)) <= limit
        if met:
            break
    everything = geometry.components_removed(map(Unit, _eligible(geometry, rule, options)))
    if not met or geometry.components_removed(removed) == everything:
        best = geometry.remaining(removed[:-1], semantics)
        raise _out_of_reach(geometry, budget, rule, options, best)
    return tuple(removed)


def _out_of_reach(
    geometry: Geometry, budget: Budget, rule: RuleName, options: Options, best: Size
) -> ToolchainError:
    first, last = _protected(rule, options)
    share = 1 - budget.cost(best) / budget.cost(geometry.size)
    asked = " at ".join(f"{name} {value:,}" for name, value in budget.asked.items())
    return ToolchainError(
        f"{asked} is out of range: {budget.needed(geometry):.3f} of the transformer's "
        f"{'parameters' if budget.max_flops is None else 'FLOPs'} would have to go, but at most {share:.3f} "
        f"can (down to {transformer_bytes(best.parameters, budget.bits):,} bytes at {budget.bits:g} bits): "
        f"{rule} keeps the first {first} and the last {last} of {len(geometry.blocks)} blocks and something "
        "between them"
    )


def _protected(rule: RuleName, options: Options) -> tuple[int, int]:
    """How many blocks stay at the start and at the end."""
    first, last = {"hpp": (2, 1), "hpp-iterative": (0, 0)}.get(rule, (1, 1))
    if rule not in ("hpp", "hpp-iterative"):
        return first, last
    return (
        first if options.protect_first is None else options.protect_first,
        last if options.protect_last is None else options.protect_last,
    )


def _eligible(geometry: Geometry, rule: RuleName, options: Options) -> range:
    first, last = _protected(rule, options)
    return range(first, max(first, len(geometry.blocks) - last))


def _components(geometry: Geometry, blocks: Iterable[int]) -> list[Unit]:
    return [Unit(block, name) for block in blocks for name in geometry.blocks[block].components]


def whole_blocks(geometry: Geometry, removed: Iterable[Unit]) -> tuple[Unit, ...]:
    """The same removals, where a block whose last component goes is named as a whole, at that place."""
    result: list[Unit] = []
    for unit in removed:
        result.append(unit)
        parts = [other for other in result if other.block == unit.block and other.component is not None]
        if len(parts) == len(geometry.blocks[unit.block].components):
            result = [other for other in result if other not in parts] + [Unit(unit.block)]
    return tuple(result)


# The rules. Each yields units in the order they go; all break ties in favour of the later block.


def _hpp(sensitivity: Sensitivity, budget: Budget | None, options: Options) -> Iterator[Unit]:
    """Whole blocks by harm weighted by position; from `threshold` on, components after them."""
    assert budget is not None
    geometry = sensitivity.geometry
    harms = sensitivity.by_unit
    eligible = _eligible(geometry, "hpp", options)
    fine = budget.needed(geometry) >= options.threshold
    enough = budget.cost(geometry.size) * (1 - options.threshold)
    removed: list[Unit] = []
    for unit in _ranked(map(Unit, eligible), harms, (), sensitivity, budget, options):
        if fine and budget.cost(geometry.remaining(removed, sensitivity.semantics)) <= enough:
            break
        removed.append(unit)
        yield unit
    if fine:
        rest = _components(geometry, [block for block in eligible if Unit(block) not in removed])
        yield from _ranked(rest, harms, removed, sensitivity, budget, options)


def _hpp_iterative(sensitivity: Sensitivity, budget: Budget | None, options: Options) -> Iterator[Unit]:
    """What costs least for what it frees, measured again after each removal.

    Lazily: harm seldom shrinks when more is gone, so a unit that has not been measured since is overtaken
    only by one that looks better. Only the few that stand first are measured, until the first of all is
    up to date (Minoux's accelerated greedy algorithm, 1978).
    """
    assert budget is not None
    if options.rescore is None:
        raise ToolchainError("hpp-iterative measures after each removal, but was given no way to: rescore")
    geometry = sensitivity.geometry
    eligible = _eligible(geometry, "hpp-iterative", options)
    units = _components(geometry, eligible) if options.grain == "components" else list(map(Unit, eligible))
    rescore = options.rescore
    options = replace(options, position_weight=options.position_weight or "none", per_parameter=True)
    removed: tuple[Unit, ...] = ()
    harms = {unit: _harm(sensitivity.by_unit, unit, sensitivity) for unit in units}
    current: set[Unit] = set()
    while units:
        ranked = _ranked(units, harms, removed, sensitivity, budget, options)
        if removed and ranked[0] not in current:
            stale = tuple(unit for unit in ranked[:_LOOK_AHEAD] if unit not in current)
            harms.update(rescore(removed, stale))
            current.update(stale)
            continue
        unit = ranked[0]
        yield unit
        units.remove(unit)
        removed = whole_blocks(geometry, (*removed, unit))
        current.clear()


_LOOK_AHEAD = 6


def _ranked(
    units: Iterable[Unit],
    harms: Mapping[Unit, float],
    removed: Iterable[Unit],
    sensitivity: Sensitivity,
    budget: Budget,
    options: Options,
) -> list[Unit]:
    """By score, smallest first."""
    geometry, semantics, removed = sensitivity.geometry, sensitivity.semantics, list(removed)
    num_blocks = len(geometry.blocks)
    cost = budget.cost(geometry.remaining(removed, semantics))

    def score(unit: Unit) -> float:
        # A removal that improves the metric is harmless, and no better than that: it is mostly noise.
        value = max(0.0, _harm(harms, unit, sensitivity)) * _weight(
            options.position_weight or "late", unit.block / num_blocks
        )
        if not options.per_parameter:
            return value
        freed = cost - budget.cost(geometry.remaining([*removed, unit], semantics))
        return value / freed if freed else math.inf

    return sorted(units, key=lambda unit: (score(unit), -unit.block))


def _weight(kind: PositionWeight, position: float) -> float:
    return {"late": math.exp(-position), "paper": math.exp(position - 1), "none": 1.0}[kind]


def _manual(sensitivity: Sensitivity, budget: Budget | None, options: Options) -> Iterator[Unit]:
    """What the options name, in their order; nothing is protected."""
    yield from options.units


# The baselines remove whole blocks and keep the first and the last, which meet the embedders and the head:
# without them nothing is left that reads the one or feeds the other as it learned to.


def _bk_sdm(sensitivity: Sensitivity, budget: Budget | None, options: Options) -> Iterator[Unit]:
    """Least harm first, wherever the block stands: BK-SDM (arXiv 2305.15798) as HierarchicalPrune runs it."""
    harms = sensitivity.by_unit
    yield from _by(lambda block: _harm(harms, Unit(block), sensitivity), sensitivity)


def _koala(sensitivity: Sensitivity, budget: Budget | None, options: Options) -> Iterator[Unit]:
    """What changes its input least first: KOALA (arXiv 2312.04005) as HierarchicalPrune runs it."""
    similarity = _measured("similarity", sensitivity)
    yield from _by(lambda block: -similarity[block], sensitivity)


def _magnitude(sensitivity: Sensitivity, budget: Budget | None, options: Options) -> Iterator[Unit]:
    """Smallest weights first, by their root mean square, as blocks differ in size."""
    magnitude = _measured("magnitude", sensitivity)
    yield from _by(lambda block: magnitude[block], sensitivity)


def _random(sensitivity: Sensitivity, budget: Budget | None, options: Options) -> Iterator[Unit]:
    blocks = list(_eligible(sensitivity.geometry, "random", options))
    random.Random(options.seed).shuffle(blocks)
    yield from map(Unit, blocks)


def _by(key: Callable[[int], float], sensitivity: Sensitivity) -> Iterator[Unit]:
    blocks = _eligible(sensitivity.geometry, "bk-sdm", _DEFAULTS)
    yield from map(Unit, sorted(blocks, key=lambda block: (key(block), -block)))


def _harm(harms: Mapping[Unit, float], unit: Unit, sensitivity: Sensitivity) -> float:
    value = harms.get(unit, math.nan)
    if not math.isfinite(value):
        raise ToolchainError(
            f"the analysis of {sensitivity.model} does not say what removing {unit} does; analyse the model "
            f"again{' with its components' if unit.component else ''}"
        )
    return value


def _measured(name: Literal["similarity", "magnitude"], sensitivity: Sensitivity) -> tuple[float, ...]:
    values: tuple[float, ...] | None = getattr(sensitivity, name)
    if values is None:
        raise ToolchainError(
            f"the analysis of {sensitivity.model} did not measure the {name} of the blocks; analyse it again"
        )
    return values


Rule = Callable[[Sensitivity, Budget | None, Options], Iterator[Unit]]
RULES: dict[RuleName, Rule] = {
    "hpp": _hpp,
    "hpp-iterative": _hpp_iterative,
    "manual": _manual,
    "bk-sdm": _bk_sdm,
    "koala": _koala,
    "random": _random,
    "magnitude": _magnitude,
}

_ITEM = re.compile(r"([0-9]+)(?:\s*-\s*([0-9]+))?(?:\.([a-z0-9_]+))?")


def parse_units(text: str, geometry: Geometry) -> tuple[Unit, ...]:
    """Read units like `25-28,31-34,13.ff,14-18.ff_context`; a range includes both of its ends.

    Raises:
        ToolchainError: An item is no unit or range, is of no block or component there is, or names what
            another one names too.
    """
    units: list[Unit] = []
    for item in map(str.strip, text.split(",")):
        match = _ITEM.fullmatch(item)
        if match is None:
            raise ToolchainError(
                f"{item!r} in {text!r} is neither a block (25), nor a range of blocks (25-28, both ends "
                "included), nor a component of one or the other (13.ff, 14-18.ff_context)"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ToolchainError(f"the range {item!r} runs backwards; write the lower block first")
        try:
            geometry.components_removed([Unit(last)])
            found = [Unit(block, match[3]) for block in range(first, last + 1)]
            geometry.components_removed(found)
            check_distinct([*units, *found])
        except ToolchainError as error:
            raise ToolchainError(f"{item!r} in {text!r}: {error}") from error
        units += found
    return tuple(units)


def format_units(units: Iterable[Unit]) -> str:
    """What `parse_units` reads: whole blocks first, then components, each in ranges and in order."""
    names: dict[str | None, list[int]] = {}
    for unit in sorted(units, key=lambda unit: (unit.component is not None, unit.block)):
        names.setdefault(unit.component, []).append(unit.block)
    items: list[str] = []
    for name, blocks in names.items():
        start = 0
        for at in range(1, len(blocks) + 1):
            if at == len(blocks) or blocks[at] != blocks[at - 1] + 1:
                span = blocks[start:at]
                text = str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}"
                items.append(text if name is None else f"{text}.{name}")
                start = at
    return ",".join(items)
