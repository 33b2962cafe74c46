"""The shapes world: captions mean scenes, and the detector sees what is there."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from toolchain.shapes.detector import detect, fits, score
from toolchain.shapes.model import build_tokenizer
from toolchain.shapes.world import (
    BACKGROUND,
    MAX_CAPTION_WORDS,
    TASKS,
    Caption,
    Object,
    Thing,
    captions,
    evaluation_captions,
    render,
    sample_caption,
    sample_scene,
)

RED_LEFT_OF_BLUE = Caption(
    text="a red circle left of a blue square",
    task="position",
    things=(Thing(shape="circle", color="red"), Thing(shape="square", color="blue")),
    relation="left of",
)


def item(shape: str, color: str, x: float, y: float = 32) -> Object:
    return Object(shape=shape, color=color, x=x, y=y, radius=10)


def test_detector_finds_at_least_995_of_1000_true_scenes() -> None:
    rng = np.random.default_rng(0)
    drawn = islice(captions(held_out=True, seed=0), 2000)
    right = [score(caption, render(sample_scene(caption, rng))) for caption in drawn]
    assert np.mean(right) >= 0.995


@pytest.mark.parametrize(
    "scene",
    [
        [item("circle", "green", 16), item("square", "blue", 48)],
        [item("circle", "blue", 16), item("square", "red", 48)],
        [item("triangle", "red", 16), item("square", "blue", 48)],
        [item("circle", "red", 48), item("square", "blue", 16)],
        [item("circle", "red", 32, 16), item("square", "blue", 32, 48)],
        [item("circle", "red", 16)],
        [item("circle", "red", 16), item("square", "blue", 48, 14), item("square", "blue", 48, 50)],
        [],
    ],
    ids=["color", "swapped colors", "shape", "swapped places", "other axis", "missing", "extra", "blank"],
)
def test_a_scene_that_differs_from_its_caption_does_not_count(scene: list[Object]) -> None:
    assert score(RED_LEFT_OF_BLUE, render([item("circle", "red", 16), item("square", "blue", 48)])) == 1
    assert score(RED_LEFT_OF_BLUE, render(scene)) == 0


def test_noise_shows_nothing_known() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert all(found.shape is None or found.color is None for found in detect(noise))


@pytest.mark.parametrize("task", TASKS)
def test_scenes_satisfy_their_captions(task: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        caption = sample_caption(task, rng)  # type: ignore[arg-type]
        assert fits(caption, sample_scene(caption, rng))


def test_rendering_is_exact() -> None:
    picture = render([item("square", "red", 32)])
    assert picture.shape == (64, 64, 3)
    assert tuple(picture[32, 32]) == (214, 48, 49)
    assert tuple(picture[0, 0]) == BACKGROUND


def test_training_never_sees_a_caption_of_the_evaluation() -> None:
    evaluated = {caption.text for caption in evaluation_captions(100)}
    trained = {caption.text for caption in islice(captions(held_out=False, seed=5), 5000)}
    assert len(evaluated) == 100 * len(TASKS)
    assert not evaluated & trained


def test_every_word_is_one_token_and_every_caption_fits() -> None:
    tokenizer = build_tokenizer(16)
    for caption in islice(captions(held_out=True, seed=2), 300):
        num_words = len(caption.text.split())
        assert num_words <= MAX_CAPTION_WORDS
        assert len(tokenizer(caption.text).input_ids) == num_words + 2
