"""A deterministic detector for the `shapes` world: what is in a picture, and does it fit a caption?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from toolchain.shapes.world import BACKGROUND, COLORS, Caption, Object, Thing

# Distance in RGB from the background at which a pixel counts as part of an object.
_FOREGROUND_DISTANCE = 70.0
# Components smaller than this many pixels are specks; the smallest true object has about 160.
_MIN_AREA = 40
# Objects are at most 22 pixels wide; a picture filled with colour is no square.
_MAX_SIZE = 32
# Share of an object's inner pixels that must agree on its colour.
_MIN_PURITY = 0.8
# Overlap with the ideal shape in the same bounding box, below which it is no shape at all.
_MIN_IOU = 0.75


@dataclass(frozen=True, kw_only=True)
class Detection:
    """What was seen; `shape` or `color` is None when something is there that is none of ours."""

    shape: str | None
    color: str | None
    x: float
    y: float


def detect(image: npt.NDArray[np.uint8]) -> list[Detection]:
    """Find every object of a [height, width, 3] picture."""
    pixels = image.astype(np.float32)
    foreground = (
        np.linalg.norm(pixels - np.array(BACKGROUND, dtype=np.float32), axis=-1) > _FOREGROUND_DISTANCE
    )
    labels, _ = ndimage.label(foreground, structure=np.ones((3, 3), dtype=np.int8))
    found = []
    for index, window in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels[window] == index
        if mask.sum() < _MIN_AREA:
            continue
        y, x = ndimage.center_of_mass(labels == index)
        inner = ndimage.binary_erosion(mask, iterations=2)
        color = _color(pixels[window][inner if inner.any() else mask])
        found.append(Detection(shape=_shape(mask), color=color, x=float(x), y=float(y)))
    return found


def fits(caption: Caption, seen: Sequence[Detection | Object]) -> bool:
    """Whether a picture shows exactly what its caption says: these objects, so placed, no others.

    Stricter than GenEval, which tolerates further objects except when counting.
    """
    if len(seen) != len(caption.things):
        return False
    return any(
        all(_matches(thing, item) for thing, item in zip(caption.things, order, strict=True))
        and _placed(caption.relation, order)
        for order in permutations(seen)
    )


def score(caption: Caption, image: npt.NDArray[np.uint8]) -> float:
    """1.0 if the picture fits its caption, else 0.0."""
    return float(fits(caption, detect(image)))


def _matches(thing: Thing, item: Detection | Object) -> bool:
    return (
        item.shape == thing.shape
        and item.color is not None
        and (thing.color is None or item.color == thing.color)
    )


def _placed(relation: str | None, order: tuple[Detection | Object, ...]) -> bool:
    if relation is None:
        return True
    dx, dy = order[1].x - order[0].x, order[1].y - order[0].y
    along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    across = dy if relation in ("left of", "right of") else dx
    return along > abs(across)


def _color(pixels: npt.NDArray[np.float32]) -> str | None:
    palette = np.array([*COLORS.values(), BACKGROUND], dtype=np.float32)
    nearest = np.linalg.norm(pixels[:, None] - palette, axis=-1).argmin(axis=1)
    counts = np.bincount(nearest, minlength=len(palette))[: len(COLORS)]
    best = int(counts.argmax())
    return list(COLORS)[best] if counts[best] >= _MIN_PURITY * len(pixels) else None


def _shape(mask: npt.NDArray[np.bool_]) -> str | None:
    height, width = mask.shape
    if not 0.75 <= height / width <= 1.33 or max(height, width) > _MAX_SIZE:
        return None
    y = (np.arange(height)[:, None] + 0.5) / height
    x = (np.arange(width)[None, :] + 0.5) / width
    ideals = {
        "circle": (x - 0.5) ** 2 + (y - 0.5) ** 2 <= 0.25,
        "square": np.ones_like(mask),
        "triangle": abs(x - 0.5) <= y / 2,
    }
    overlap = {name: (mask & ideal).sum() / (mask | ideal).sum() for name, ideal in ideals.items()}
    best = max(overlap, key=lambda name: overlap[name])
    return best if overlap[best] >= _MIN_IOU else None
