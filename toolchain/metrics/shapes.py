"""ShapesEval's detector as a metric: does the picture show exactly what its caption says?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from toolchain.errors import ToolchainError
from toolchain.metrics import PictureMetric
from toolchain.shapes.detector import score
from toolchain.shapes.world import COLORS, RELATIONS, SHAPES, Caption, Relation, Task, Thing

_COUNTS = {"two": 2, "three": 3, "four": 4}
_SHAPE, _COLOR = "|".join(SHAPES), "|".join(COLORS)
_CORE = re.compile(
    rf"\b(?:(?P<count>{'|'.join(_COUNTS)}) (?:(?P<colors>{_COLOR}) )?(?P<shapes>{_SHAPE})s"
    rf"|(?:a|one|a single|exactly one|just one|only one) (?:(?P<color>{_COLOR}) )?(?P<shape>{_SHAPE})"
    rf"(?: (?P<relation>and|{'|'.join(RELATIONS)}) a (?:(?P<color2>{_COLOR}) )?(?P<shape2>{_SHAPE}))?)\b"
)


@dataclass(frozen=True, kw_only=True)
class Shapes(PictureMetric):
    """1 for a picture that fits its caption, else 0; the prompts are captions of the `shapes` world."""

    name = "shapes"

    def check(self, prompts: Sequence[str]) -> None:
        """See `PictureMetric`."""
        for prompt in prompts:
            read_caption(prompt)

    def scores(self, prompts: Sequence[str], pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """See `PictureMetric`."""
        pairs = zip(prompts, pictures, strict=True)
        return np.array([score(read_caption(prompt), picture) for prompt, picture in pairs])


def read_caption(text: str) -> Caption:
    """What a caption of the `shapes` world means.

    Raises:
        ToolchainError: It speaks of none of our shapes, or of more than the world's grammar can say.
    """
    found = list(_CORE.finditer(text))
    if len(found) != 1 or len(re.findall(rf"\b(?:{_SHAPE})s?\b", text)) != 1 + bool(found[0]["shape2"]):
        raise ToolchainError(
            f"{text!r} is no caption of the shapes world, so the metric 'shapes' cannot judge its picture; "
            "a caption is like 'a red circle', 'three squares' or 'a circle left of a square'"
        )
    part = found[0]
    if part["count"]:
        things = (Thing(shape=part["shapes"], color=part["colors"]),) * _COUNTS[part["count"]]
        return Caption(text=text, task="counting", things=things)
    first = Thing(shape=part["shape"], color=part["color"])
    if part["shape2"] is None:
        task: Task = "colors" if first.color else "single_object"
        return Caption(text=text, task=task, things=(first,))
    things = (first, Thing(shape=part["shape2"], color=part["color2"]))
    if part["relation"] == "and":
        return Caption(text=text, task="color_attr" if first.color else "two_object", things=things)
    return Caption(text=text, task="position", things=things, relation=cast("Relation", part["relation"]))
