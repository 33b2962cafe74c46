"""What was measured and what was decided, as data: sensitivities and plans. Pure; no torch.

A plan says which units go and how strongly each of the rest may be updated while the student learns.
`rules.py` decides what goes; `prune` and `distill` obey.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, TypeVar, get_args

from toolchain.errors import ToolchainError
from toolchain.geometry import Geometry, Semantics, Size, Unit, geometry_from_json

PLAN_FILE, SENSITIVITY_FILE = "plan.json", "sensitivity.json"
SCHEMA_VERSIONS = {"plan": 3, "analysis": 2}

RuleName = Literal["hpp", "hpp-iterative", "manual", "bk-sdm", "koala", "random", "magnitude"]
StrengthMode = Literal["none", "pwp", "sgdistill", "sgdistill-binary", "graded"]

EMBEDDERS, HEAD = "embedders", "head"

_BITS = (4, 8, 16)

# Under `graded`, what stands before the first change learns too, at this share of its strength.
_PREFIX_DAMPING = 0.1
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Harm:
    """What removing some units, and nothing else, does to the model."""

    removed: tuple[Unit, ...]
    """One unit; two where pairs were measured."""
    harm: float
    """In the metric's unit: larger is worse, 0 is harmless, below 0 the model got better."""
    standard_error: float


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The contribution analysis of a model."""

    model: str
    """As the user named it."""
    geometry: Geometry
    semantics: Semantics
    metric: str
    baseline: float
    """The metric of the whole model, on the same pictures or states as the harms."""
    settings: dict[str, Any]
    """What the harms depend on: prompts, seeds, steps, guidance."""
    harms: tuple[Harm, ...]
    similarity: tuple[float, ...] | None = None
    """Of what enters and what leaves each block, as a cosine; None if it was not measured."""
    magnitude: tuple[float, ...] | None = None
    """Root mean square of the weights of each block; None if it was not measured."""

    def __post_init__(self) -> None:
        _check_choice("semantics", self.semantics, get_args(Semantics))
        for item in self.harms:
            self.geometry.components_removed(item.removed)
            if not item.removed or not math.isfinite(item.harm):
                raise ToolchainError(f"the harm of {_text(item.removed) or 'nothing'} is {item.harm}")
        num_blocks = len(self.geometry.blocks)
        for name, values in (("similarity", self.similarity), ("magnitude", self.magnitude)):
            if values is not None and (len(values) != num_blocks or not all(map(math.isfinite, values))):
                raise ToolchainError(f"{name} is {list(values)}; one number for each of {num_blocks} blocks")

    @cached_property
    def by_unit(self) -> dict[Unit, float]:
        """The harm of every unit that was removed alone."""
        return {item.removed[0]: item.harm for item in self.harms if len(item.removed) == 1}


def unmeasured(model: str, geometry: Geometry, semantics: Semantics) -> Sensitivity:
    """All that is known of a model without an analysis: enough for the rules `manual` and `random`."""
    return Sensitivity(
        model=model,
        geometry=geometry,
        semantics=semantics,
        metric="none",
        baseline=0.0,
        settings={},
        harms=(),
    )


@dataclass(frozen=True, kw_only=True)
class CompressionPlan:
    """What `prune` and `distill` obey; block numbers are the teacher's."""

    model: str
    geometry: Geometry
    semantics: Semantics
    rule: RuleName
    removed: tuple[Unit, ...]
    """In the order of removal. A block all of whose components go is one unit."""
    strength: dict[str, float]
    """The share of the base learning rate, from 0 (frozen) to 1, of `embedders`, `head`, a block (`7`) or a
    component (`7.ff`); the most specific entry counts."""
    asked: dict[str, Any]
    """The budget, and what else was not left at its default."""
    bits: dict[str, int] = field(default_factory=dict)
    """Of the weights of kept components (`7.ff`), once they are exported: 4, 8 or 16. What is not named here
    gets what the export is asked for."""

    def __post_init__(self) -> None:
        _check_choice("semantics", self.semantics, get_args(Semantics))
        _check_choice("rule", self.rule, get_args(RuleName))
        check_distinct(self.removed)
        gone = self.geometry.components_removed(self.removed)
        if not self.kept_blocks:
            raise ToolchainError(
                f"this plan removes every block of the {len(self.geometry.blocks)}; keep at least one"
            )
        kept = [unit for unit in self.geometry.units if unit.component not in gone.get(unit.block, ())]
        known = {EMBEDDERS, HEAD, *map(str, kept), *map(str, self.kept_blocks)}
        if unknown := sorted(self.strength.keys() - known):
            raise ToolchainError(
                f"strengths of {', '.join(unknown)}: no such part is kept; "
                "there are embedders, head, and the blocks and components that stay"
            )
        for name in (EMBEDDERS, HEAD, *map(str, kept)):
            try:
                value = self.strength_of(name)
            except KeyError:
                raise ToolchainError(f"the strengths say nothing of {name}, which is kept") from None
            if not 0 <= value <= 1:
                raise ToolchainError(f"the strength of {name} is {value}; it is a number from 0 to 1")
        if unknown := sorted(self.bits.keys() - set(map(str, kept))):
            raise ToolchainError(
                f"bits of {', '.join(unknown)}: no such component is kept; name components that stay, like "
                f"{kept[0]}"
            )
        for name, bits in self.bits.items():
            if type(bits) is not int or bits not in _BITS:
                raise ToolchainError(f"the bits of {name} are {bits!r}; there are 4, 8 and 16")

    def strength_of(self, name: str) -> float:
        """Of `embedders`, `head`, or a kept component like `7.ff`."""
        return self.strength[name] if name in self.strength else self.strength[name.partition(".")[0]]

    @property
    def removed_components(self) -> dict[int, frozenset[str]]:
        """What the kept blocks that lose something lose."""
        kept = set(self.kept_blocks)
        gone = self.geometry.components_removed(self.removed)
        return {block: names for block, names in gone.items() if block in kept}

    @property
    def kept_blocks(self) -> tuple[int, ...]:
        """The student's blocks in order: the student's block k is the teacher's `kept_blocks[k]`."""
        gone = self.geometry.components_removed(self.removed)
        return tuple(
            index
            for index, block in enumerate(self.geometry.blocks)
            if gone.get(index, frozenset()) != set(block.components)
        )

    @property
    def student_bits(self) -> dict[str, int]:
        """`bits` by the numbers that the student's blocks have."""
        number = {teacher: str(student) for student, teacher in enumerate(self.kept_blocks)}
        units = {Unit.parse(name): bits for name, bits in self.bits.items()}
        return {f"{number[unit.block]}.{unit.component}": bits for unit, bits in units.items()}

    @property
    def first_change(self) -> int:
        """The first block that loses anything; the number of blocks if none does."""
        return first_change(self.geometry, self.removed)

    @property
    def shared_prefix(self) -> int:
        """How many blocks at the start, and the embedders before them, are the teacher's for good: they lose
        nothing and are frozen. 0 where the embedders learn."""
        if self.strength_of(EMBEDDERS):
            return 0
        for index in range(self.first_change):
            if any(self.strength_of(f"{index}.{name}") for name in self.geometry.blocks[index].components):
                return index
        return self.first_change

    @property
    def reached(self) -> Size:
        """What is left."""
        return self.geometry.remaining(self.removed, self.semantics)

    @property
    def ratio_reached(self) -> float:
        """Share of the transformer's parameters that goes."""
        return 1 - self.reached.parameters / self.geometry.size.parameters

    @property
    def flops_ratio_reached(self) -> float:
        """Share of the transformer's FLOPs that goes. Norms and the text stream hold many parameters and
        need few FLOPs: removing them buys memory, hardly any speed."""
        return 1 - self.reached.flops / self.geometry.size.flops

    @property
    def sizes(self) -> dict[str, dict[str, int]]:
        """Parameters, bytes at 16 and at 4 bits per weight, and FLOPs, `before` and `after`."""
        return {
            when: {
                "parameters": size.parameters,
                "bytes_16_bit": transformer_bytes(size.parameters, 16),
                "bytes_4_bit": transformer_bytes(size.parameters, 4),
                "flops": size.flops,
            }
            for when, size in (("before", self.geometry.size), ("after", self.reached))
        }


def transformer_bytes(parameters: int, bits: float) -> int:
    """What so many parameters take at so many bits each."""
    return math.ceil(parameters * bits / 8)


def first_change(geometry: Geometry, removed: Iterable[Unit]) -> int:
    """The first block that loses anything; the number of blocks if none does."""
    return min(geometry.components_removed(removed), default=len(geometry.blocks))


def check_distinct(units: Iterable[Unit]) -> None:
    """Refuse a unit that is named twice, as itself or as part of its block.

    Raises:
        ToolchainError: There is one.
    """
    seen: set[Unit] = set()
    blocks: set[int] = set()
    for unit in units:
        if unit in seen:
            raise ToolchainError(f"{unit} is removed twice")
        seen.add(unit)
        if unit.component is None:
            blocks.add(unit.block)
    for unit in sorted(seen - {Unit(block) for block in blocks}):
        if unit.block in blocks:
            raise ToolchainError(
                f"{unit} goes with block {unit.block}, which is removed too; name one of them"
            )


def strengths(
    sensitivity: Sensitivity,
    removed: Iterable[Unit],
    mode: StrengthMode,
    *,
    power: float = 0.5,
    floor: float = 0.0,
) -> dict[str, float]:
    """How strongly each kept part may be updated, as a share of the base learning rate.

    - `none`: everything learns in full.
    - `pwp`, positional weight preservation: everything before the first block that loses something is
      frozen, embedders included; the rest learns in full.
    - `sgdistill`: `pwp`, and what learns does so the less, the more it matters:
      min(1, (reference / harm) ** power), the reference being the median harm of all components that
      learn. The paper scales updates by 1 / harm; how it normalises that is not known to us, so this is ours.
    - `sgdistill-binary`: the same rounded: a component whose strength would be below 1/2 is frozen (with the
      default power: if its harm is more than four times the median), the rest learns in full. The paper's
      own code is binary too, but freezes what is listed by hand.
    - `graded`: nothing is frozen. Strengths fall with harm as in `sgdistill`, over all blocks; what stands
      before the first change learns at a tenth of that, and the embedders like the least of all.

    A component that was not measured counts as its block. The head was not measured and learns in full.

    Args:
        sensitivity: The analysis; only the last three modes read its harms.
        removed: What goes.
        mode: One of the above.
        power: How steeply strength falls with harm; 0 does not let it fall.
        floor: The least strength `sgdistill` and `graded` give to what learns.

    Raises:
        ToolchainError: There is no such mode or harm, or a number is out of range.
    """
    _check_choice("mode of update strengths", mode, get_args(StrengthMode))
    if not 0 <= power < math.inf or not 0 <= floor <= 1:
        raise ToolchainError(f"power is {power} and floor {floor}; power is at least 0, floor from 0 to 1")
    geometry, removed = sensitivity.geometry, tuple(removed)
    gone = geometry.components_removed(removed)
    kept = [unit for unit in geometry.units if unit.component not in gone.get(unit.block, ())]
    start = first_change(geometry, removed) if mode != "none" else 0
    learning = [unit for unit in kept if unit.block >= start]
    result = dict.fromkeys(kept, 0.0) | dict.fromkeys(learning, 1.0)
    embedders = 1.0 if mode == "none" else 0.0
    if mode in ("sgdistill", "sgdistill-binary"):
        result |= _falling(sensitivity, learning, power, floor if mode == "sgdistill" else 0.0)
    if mode == "sgdistill-binary":
        result = {unit: float(value >= 0.5) for unit, value in result.items()}
    if mode == "graded":
        result = {
            unit: value * (1.0 if unit.block >= start else _PREFIX_DAMPING)
            for unit, value in _falling(sensitivity, kept, power, floor).items()
        }
        embedders = min(result.values(), default=1.0)
    return {EMBEDDERS: embedders, **_by_block(result), HEAD: 1.0}


def _falling(sensitivity: Sensitivity, units: list[Unit], power: float, floor: float) -> dict[Unit, float]:
    harms = {unit: harm_of(sensitivity, unit) for unit in units}
    positive = [harm for harm in harms.values() if harm > 0]
    if not positive:
        return dict.fromkeys(units, 1.0)
    # Where most do no harm at all the median is 0, and the least harmful of the others takes its place.
    reference = statistics.median(harms.values()) or min(positive)
    return {
        unit: 1.0 if harm <= reference else max(floor, (reference / harm) ** power)
        for unit, harm in harms.items()
    }


def harm_of(sensitivity: Sensitivity, unit: Unit) -> float:
    """The harm of a component, or of its block where it was not measured itself; below 0 counts as 0.

    Raises:
        ToolchainError: Neither was measured.
    """
    by_unit = sensitivity.by_unit
    harm = by_unit.get(unit, by_unit.get(Unit(unit.block)))
    if harm is None:
        raise ToolchainError(
            f"the analysis of {sensitivity.model} does not say what removing {unit} or its block does; "
            "analyse the model again"
        )
    return max(0.0, harm)


def _by_block(strength: dict[Unit, float]) -> dict[str, float]:
    """One entry for a block whose components share a strength, one for each component otherwise."""
    blocks: dict[int, dict[Unit, float]] = {}
    for unit, value in strength.items():
        blocks.setdefault(unit.block, {})[unit] = value
    result: dict[str, float] = {}
    for block, values in blocks.items():
        if len(set(values.values())) == 1:
            result[str(block)] = next(iter(values.values()))
        else:
            result |= {str(unit): value for unit, value in values.items()}
    return result


def to_json(value: Sensitivity | CompressionPlan) -> dict[str, Any]:
    """A plan or an analysis as the object its file holds."""
    data = {field.name: getattr(value, field.name) for field in fields(value)}
    data["geometry"] = asdict(value.geometry)
    if isinstance(value, CompressionPlan):
        data["removed"] = list(map(str, value.removed))
        data["sizes"] = value.sizes
    else:
        data["harms"] = [asdict(item) | {"removed": list(map(str, item.removed))} for item in value.harms]
    what = "plan" if isinstance(value, CompressionPlan) else "analysis"
    return {"schema_version": SCHEMA_VERSIONS[what], **data}


def plan_from_json(data: dict[str, Any]) -> CompressionPlan:
    """Read what `to_json` wrote, strictly. `sizes` may be left out, by whoever edits a plan by hand.

    Raises:
        ToolchainError: It is of another schema, or is no sound plan.
    """

    def read(values: dict[str, Any]) -> CompressionPlan:
        sizes = values.pop("sizes", None)
        removed = tuple(map(Unit.parse, values["removed"]))
        plan = CompressionPlan(
            # Subscripted, for it has a default and the file names it all the same.
            **{
                **values,
                "geometry": geometry_from_json(values["geometry"]),
                "removed": removed,
                "bits": dict(values["bits"]),
            }
        )
        if sizes not in (None, plan.sizes):
            raise ToolchainError(
                f"the plan says that it leaves {sizes.get('after')}, but removing {_text(plan.removed)} "
                f"leaves {plan.sizes['after']}; if the plan was edited by hand, delete `sizes` from it"
            )
        return plan

    return _read(data, "plan", read)


def sensitivity_from_json(data: dict[str, Any]) -> Sensitivity:
    """Read what `to_json` wrote, strictly.

    Raises:
        ToolchainError: It is of another schema, or is no sound analysis.
    """

    def read(values: dict[str, Any]) -> Sensitivity:
        harms = tuple(
            Harm(**{**item, "removed": tuple(map(Unit.parse, item["removed"]))}) for item in values["harms"]
        )
        values = {**values, "geometry": geometry_from_json(values["geometry"]), "harms": harms}
        for name in ("similarity", "magnitude"):
            # Subscripted, not asked for: the file names both, if only to say that there is none.
            values[name] = None if values[name] is None else tuple(values[name])
        return Sensitivity(**values)

    return _read(data, "analysis", read)


def _read(data: dict[str, Any], what: str, read: Callable[[dict[str, Any]], _T]) -> _T:
    values = dict(data)
    version = values.pop("schema_version", None)
    if version != SCHEMA_VERSIONS[what]:
        raise ToolchainError(
            f"this is no {what} of schema version {SCHEMA_VERSIONS[what]} but of {version}; "
            "make it again with this version of hptool"
        )
    try:
        return read(values)
    except ToolchainError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ToolchainError(f"this is no {what}: {error!r}; it has the keys {sorted(data)}") from error


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ToolchainError(f"unknown {what} {value!r}; there are {', '.join(choices)}")


def _text(units: Iterable[Unit]) -> str:
    return ", ".join(map(str, units))
