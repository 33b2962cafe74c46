"""What an MMDiT is made of, as numbers: blocks, their components, parameters and FLOPs. Pure; no torch.

A *component* is what a plan may remove on its own (`attn`, `ff`, …). A *part* is the smallest piece of a
block that disappears as a whole; removing one component takes several parts with it, for instance the
rows of the AdaLN linear that nothing reads any more.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from toolchain.errors import ToolchainError

Semantics = Literal["zero", "identity"]
"""What a removed component leaves behind: nothing (its sub-layer contributes zero), or its input passed
through, as the paper's own code does."""

_UNIT = re.compile(r"(0|[1-9][0-9]*)(?:\.([a-z0-9_]+))?")


@dataclass(frozen=True, order=True)
class Unit:
    """A whole block, or one component of it; written `25` or `13.ff`."""

    block: int
    component: str | None = None

    def __str__(self) -> str:
        return str(self.block) if self.component is None else f"{self.block}.{self.component}"

    @staticmethod
    def parse(text: str) -> Unit:
        """Read what `str` wrote.

        Raises:
            ToolchainError: It is neither a block nor a component.
        """
        match = _UNIT.fullmatch(text)
        if match is None:
            raise ToolchainError(f"{text!r} is neither a block, like 25, nor a component of one, like 13.ff")
        return Unit(int(match[1]), match[2])


@dataclass(frozen=True, kw_only=True)
class Part:
    """The smallest piece of a block that goes as a whole."""

    name: str
    parameters: int
    flops: int
    """Of one forward pass of one sample; a multiplication and an addition count as two."""
    zero: tuple[tuple[str, ...], ...]
    """Gone under `zero` once all components of any of these sets are removed."""
    identity: tuple[tuple[str, ...], ...]
    """The same under `identity`."""
    only_for_next: bool = False
    """Whether it only makes what the next block reads, so that it goes from a block that becomes the last."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block of the transformer."""

    kind: str
    """`joint` (two streams) or `single`."""
    components: tuple[str, ...]
    parts: tuple[Part, ...]

    @property
    def parameters(self) -> int:
        """Of the whole block."""
        return sum(part.parameters for part in self.parts)

    @property
    def flops(self) -> int:
        """Of the whole block."""
        return sum(part.flops for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class Size:
    """Parameters and FLOPs of what is left of a model."""

    parameters: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """A transformer as numbers, at one picture size and text length."""

    family: str
    blocks: tuple[Block, ...]
    """In the order they run."""
    other_parameters: int
    """Outside the blocks: embedders, final norm and projection."""
    other_flops: int
    height: int
    """Pixels, as `width`."""
    width: int
    text_tokens: int

    @property
    def size(self) -> Size:
        """Of the whole transformer."""
        return self.remaining((), "zero")

    @property
    def units(self) -> tuple[Unit, ...]:
        """Every component of every block."""
        return tuple(
            Unit(index, name) for index, block in enumerate(self.blocks) for name in block.components
        )

    def remaining(self, removed: Iterable[Unit], semantics: Semantics) -> Size:
        """What is left without some units.

        Raises:
            ToolchainError: There is no such block or component.
        """
        gone = self.components_removed(removed)
        kept = [
            index for index, block in enumerate(self.blocks) if gone.get(index) != frozenset(block.components)
        ]
        parameters, flops = self.other_parameters, self.other_flops
        for index in kept:
            for part in kept_parts(
                self.blocks[index], gone.get(index, frozenset()), semantics, last=index == kept[-1]
            ):
                parameters += part.parameters
                flops += part.flops
        return Size(parameters=parameters, flops=flops)

    def components_removed(self, removed: Iterable[Unit]) -> dict[int, frozenset[str]]:
        """The removed components of every block that loses any; a whole block is all of its components.

        Raises:
            ToolchainError: There is no such block or component.
        """
        return components_removed([block.components for block in self.blocks], removed)


def components_removed(
    blocks: Sequence[tuple[str, ...]], removed: Iterable[Unit]
) -> dict[int, frozenset[str]]:
    """`Geometry.components_removed`, of the components of each block."""
    gone: dict[int, set[str]] = {}
    for unit in removed:
        if unit.block >= len(blocks):
            raise ToolchainError(
                f"there is no block {unit.block}: the model has the blocks 0 to {len(blocks) - 1}"
            )
        components = blocks[unit.block]
        if unit.component is not None and unit.component not in components:
            raise ToolchainError(
                f"block {unit.block} has no component {unit.component!r}; it has {', '.join(components)}"
            )
        names = components if unit.component is None else (unit.component,)
        gone.setdefault(unit.block, set()).update(names)
    return {block: frozenset(names) for block, names in sorted(gone.items())}


def kept_parts(
    block: Block, removed: Collection[str], semantics: Semantics, *, last: bool = False
) -> tuple[Part, ...]:
    """Parts of a block that stay when some components are removed; none if all are.

    Args:
        block: The whole block.
        removed: Some of its components.
        semantics: What they leave behind.
        last: Whether no block is left behind it.
    """
    if set(removed) >= set(block.components):
        return ()
    return tuple(
        part
        for part in block.parts
        if not (last and part.only_for_next)
        and not any(set(together) <= set(removed) for together in getattr(part, semantics))
    )


def geometry_from_json(data: dict[str, Any]) -> Geometry:
    """Read what `dataclasses.asdict` made of a geometry."""
    blocks = tuple(
        Block(
            kind=block["kind"],
            components=tuple(block["components"]),
            parts=tuple(
                Part(
                    **{
                        **part,
                        "zero": tuple(map(tuple, part["zero"])),
                        "identity": tuple(map(tuple, part["identity"])),
                    }
                )
                for part in block["parts"]
            ),
        )
        for block in data["blocks"]
    )
    fields = {field.name for field in dataclasses.fields(Geometry)}
    if set(data) != fields:
        raise ToolchainError(f"a geometry has the keys {sorted(fields)}, not {sorted(data)}")
    return Geometry(**{**data, "blocks": blocks})
