"""The `shapes` world: a caption grammar and the renderer that draws what a caption says.

Six tasks mirror GenEval's (https://arxiv.org/abs/2310.11513): single object, two objects, counting,
colours, position and attribute binding. A picture is 64x64 RGB; an object is one of three shapes in
one of six flat colours on a light background. Pictures are cheap and exact, so quality on this world
is measured by a detector (`toolchain.shapes.detector`) and needs no human and no downloaded scorer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Task = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
Relation = Literal["left of", "right of", "above", "below"]

TASKS: tuple[Task, ...] = get_args(Task)
RELATIONS: tuple[Relation, ...] = get_args(Relation)
SHAPES = ("circle", "square", "triangle")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "green": (46, 160, 67),
    "blue": (45, 98, 220),
    "yellow": (246, 201, 38),
    "purple": (142, 62, 184),
    "black": (30, 30, 34),
}
BACKGROUND = (243, 242, 236)
IMAGE_SIZE = 64
MAX_CAPTION_WORDS = 12
MIN_RADIUS, MAX_RADIUS = 9.0, 11.0

_COUNT_WORDS = {2: "two", 3: "three", 4: "four"}
_ONE = ("a", "one", "a single", "exactly one", "just one", "only one")
_PREFIXES = (
    *("", "a photo of", "a picture of", "an image of", "a drawing of", "a painting of"),
    *("a sketch of", "a print of", "here is", "there is", "draw", "paint", "show", "show me"),
    *("we see", "you see"),
)
_SUFFIXES = (
    *("", "here", "on paper", "on a plain background", "on a light background", "drawn neatly"),
    *("in flat color", "and nothing else"),
)


@dataclass(frozen=True, kw_only=True)
class Thing:
    """What a caption says of one object; `None` means the caption leaves the colour open."""

    shape: str
    color: str | None = None


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A caption and its meaning, which is what the detector scores a picture against."""

    text: str
    task: Task
    things: tuple[Thing, ...]
    relation: Relation | None = None
    """Where `things[0]` lies as seen from `things[1]`; None unless the task is `position`."""


@dataclass(frozen=True, kw_only=True)
class Object:
    """One drawn object: its centre and half-width in pixels, x to the right and y downwards."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


def is_held_out(text: str) -> bool:
    """Whether a caption belongs to the fifth of all captions that is never trained on."""
    return hashlib.sha256(text.encode()).digest()[0] % 5 == 0


def sample_caption(task: Task, rng: np.random.Generator) -> Caption:
    """Draw one caption of a task, at most `MAX_CAPTION_WORDS` long."""
    while True:
        core, things, relation = _sample_meaning(task, rng)
        words = (_PREFIXES[rng.integers(len(_PREFIXES))], core, _SUFFIXES[rng.integers(len(_SUFFIXES))])
        text = " ".join(part for part in words if part)
        if len(text.split()) <= MAX_CAPTION_WORDS:
            return Caption(text=text, task=task, things=things, relation=relation)


def captions(*, held_out: bool, seed: int, weights: dict[Task, float] | None = None) -> Iterator[Caption]:
    """Yield captions without end, either only held-out ones or only those for training.

    Args:
        held_out: Which side of the split of `is_held_out`.
        seed: The stream is a function of it alone.
        weights: Relative frequency of each task; all tasks alike by default.
    """
    rng = np.random.default_rng(seed)
    shares = np.array([1.0 if weights is None else weights[task] for task in TASKS])
    shares /= shares.sum()
    while True:
        caption = sample_caption(TASKS[rng.choice(len(TASKS), p=shares)], rng)
        if is_held_out(caption.text) == held_out:
            yield caption


def evaluation_captions(num_per_task: int, *, seed: int = 0) -> list[Caption]:
    """The first `num_per_task` distinct held-out captions of every task, task by task."""
    chosen: list[Caption] = []
    for index, task in enumerate(TASKS):
        rng = np.random.default_rng((seed, index))
        texts: set[str] = set()
        while len(texts) < num_per_task:
            caption = sample_caption(task, rng)
            if is_held_out(caption.text) and caption.text not in texts:
                texts.add(caption.text)
                chosen.append(caption)
    return chosen


def sample_scene(caption: Caption, rng: np.random.Generator) -> list[Object]:
    """Draw a scene that satisfies a caption, with all it leaves open chosen at random.

    One object lies near the middle; two lie side by side or one above the other; three or four lie
    in different quadrants. Objects never touch.
    """
    radius = rng.uniform(MIN_RADIUS, MAX_RADIUS)
    shared_color = _pick(tuple(COLORS), rng)
    same_kind = caption.task == "counting"
    return [
        Object(
            shape=thing.shape,
            color=thing.color or (shared_color if same_kind else _pick(tuple(COLORS), rng)),
            x=x + rng.uniform(-2.5, 2.5),
            y=y + rng.uniform(-2.5, 2.5),
            radius=radius,
        )
        for thing, (x, y) in zip(caption.things, _layout(caption, rng), strict=True)
    ]


def render(scene: list[Object]) -> npt.NDArray[np.uint8]:
    """Draw a scene. Returns the picture as [height, width, 3] bytes."""
    scale = 4  # drawn larger and averaged down, so that edges are smooth
    image = Image.new("RGB", (IMAGE_SIZE * scale, IMAGE_SIZE * scale), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for item in scene:
        left, top = (item.x - item.radius) * scale, (item.y - item.radius) * scale
        right, bottom = (item.x + item.radius) * scale, (item.y + item.radius) * scale
        color = COLORS[item.color]
        if item.shape == "circle":
            draw.ellipse((left, top, right, bottom), fill=color)
        elif item.shape == "square":
            draw.rectangle((left, top, right, bottom), fill=color)
        else:
            draw.polygon((item.x * scale, top, right, bottom, left, bottom), fill=color)
    return np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX))


def _sample_meaning(task: Task, rng: np.random.Generator) -> tuple[str, tuple[Thing, ...], Relation | None]:
    first, second = (str(shape) for shape in rng.permutation(SHAPES)[:2])
    color, other_color = (str(name) for name in rng.permutation(tuple(COLORS))[:2])
    if task == "single_object":
        return f"{_pick(_ONE, rng)} {first}", (Thing(shape=first),), None
    if task == "colors":
        one = _pick(_ONE, rng)
        return f"{one} {color} {first}", (Thing(shape=first, color=color),), None
    if task == "counting":
        count = int(rng.integers(2, 5))
        named = rng.random() < 0.5
        words = f"{_COUNT_WORDS[count]} {color} {first}s" if named else f"{_COUNT_WORDS[count]} {first}s"
        return words, (Thing(shape=first, color=color if named else None),) * count, None
    colored = task == "color_attr" or (task == "position" and rng.random() < 0.5)
    things = (
        Thing(shape=first, color=color if colored else None),
        Thing(shape=second, color=other_color if colored else None),
    )
    a, b = (f"a {thing.color} {thing.shape}" if colored else f"a {thing.shape}" for thing in things)
    if task == "position":
        relation = RELATIONS[rng.integers(len(RELATIONS))]
        return f"{a} {relation} {b}", things, relation
    return f"{a} and {b}", things, None


def _layout(caption: Caption, rng: np.random.Generator) -> list[tuple[float, float]]:
    near, middle, far = 16.0, 32.0, 48.0
    row, column = [(near, middle), (far, middle)], [(middle, near), (middle, far)]
    if len(caption.things) == 1:
        return [(middle, middle)]
    if len(caption.things) == 2:
        if caption.relation is None:
            places = row if rng.random() < 0.5 else column
            return places if rng.random() < 0.5 else places[::-1]
        places = row if caption.relation in ("left of", "right of") else column
        return places if caption.relation in ("left of", "above") else places[::-1]
    quadrants = [(near, near), (far, near), (near, far), (far, far)]
    chosen = sorted(rng.permutation(4)[: len(caption.things)])
    return [quadrants[index] for index in chosen]


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[rng.integers(len(options))]
