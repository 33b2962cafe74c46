"""The shapes world: captions mean scenes, and the detector sees what is there."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.shapes.detector import detect, fits, score
from toolchain.shapes.model import build_tokenizer
from toolchain.shapes.world import (
    BACKGROUND,
    COLORS,
    IMAGE_SIZE,
    MAX_CAPTION_WORDS,
    RELATIONS,
    TASKS,
    Caption,
    Object,
    Thing,
    captions,
    evaluation_captions,
    is_held_out,
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


def test_every_word_of_the_grammar_is_one_token() -> None:
    tokenizer = build_tokenizer(16)
    words = {
        word for caption in islice(captions(held_out=True, seed=4), 3000) for word in caption.text.split()
    }
    assert words >= {*COLORS, "circle", "squares", "two", "four", "left", "of", "single", "nothing", "paper"}
    assert {word for word in words if len(tokenizer(word).input_ids) != 3} == set()


@given(st.integers(0, 2**32), st.sampled_from(TASKS))
@settings(max_examples=50)
def test_a_scene_of_any_seed_fits_its_caption_in_any_order_and_renders_alike_twice(
    seed: int, task: str
) -> None:
    rng = np.random.default_rng(seed)
    caption = sample_caption(task, rng)  # type: ignore[arg-type]
    scene = sample_scene(caption, rng)
    assert len(caption.text.split()) <= MAX_CAPTION_WORDS
    assert fits(caption, scene)
    assert fits(caption, scene[::-1])
    assert np.array_equal(render(scene), render(list(scene)))


def test_captions_are_a_function_of_their_seed() -> None:
    first, again, other = (
        [caption.text for caption in islice(captions(held_out=False, seed=seed), 20)] for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_evaluation_takes_as_many_distinct_held_out_captions_of_every_task() -> None:
    chosen = evaluation_captions(30, seed=7)
    assert [caption.task for caption in chosen] == [task for task in TASKS for _ in range(30)]
    assert len({caption.text for caption in chosen}) == len(chosen)
    assert all(is_held_out(caption.text) for caption in chosen)


def test_a_longer_evaluation_begins_as_a_shorter_one() -> None:
    longer = evaluation_captions(9)
    assert [longer[9 * task + index] for task in range(6) for index in range(4)] == evaluation_captions(4)


def test_both_sides_of_the_split_have_every_task() -> None:
    for held_out in (True, False):
        drawn = list(islice(captions(held_out=held_out, seed=3), 200))
        assert {caption.task for caption in drawn} == set(TASKS)
        assert {is_held_out(caption.text) for caption in drawn} == {held_out}


def test_a_weight_of_0_leaves_a_task_out() -> None:
    weights = dict.fromkeys(TASKS, 1.0) | {"counting": 0.0}
    drawn = islice(captions(held_out=False, seed=0, weights=weights), 200)
    assert {caption.task for caption in drawn} == set(TASKS) - {"counting"}


CORNERS = [(16, 16), (48, 16), (16, 48), (48, 48)]


@pytest.mark.parametrize("asked", [2, 3, 4])
@pytest.mark.parametrize("drawn", [1, 2, 3, 4])
def test_only_the_exact_number_counts(asked: int, drawn: int) -> None:
    caption = Caption(text="", task="counting", things=(Thing(shape="triangle", color="black"),) * asked)
    scene = [item("triangle", "black", x, y) for x, y in CORNERS[:drawn]]
    assert score(caption, render(scene)) == (asked == drawn)


@pytest.mark.parametrize("wrong", [item("circle", "green", 48), item("square", "yellow", 48)])
def test_one_that_is_not_alike_spoils_the_count(wrong: Object) -> None:
    caption = Caption(text="", task="counting", things=(Thing(shape="circle", color="yellow"),) * 2)
    assert score(caption, render([item("circle", "yellow", 16), item("circle", "yellow", 48)])) == 1
    assert score(caption, render([item("circle", "yellow", 16), wrong])) == 0


@pytest.mark.parametrize("shape", ["circle", "square", "triangle"])
@pytest.mark.parametrize("color", COLORS)
def test_every_shape_in_every_color_is_told_from_all_others(shape: str, color: str) -> None:
    (seen,) = detect(render([item(shape, color, 32)]))
    assert (seen.shape, seen.color) == (shape, color)
    assert (seen.x, seen.y) == pytest.approx((32, 32), abs=4)


@pytest.mark.parametrize("drawn", RELATIONS)
def test_a_picture_shows_one_relation_and_none_of_the_others(drawn: str) -> None:
    things = (Thing(shape="circle"), Thing(shape="square"))
    asked = {
        relation: Caption(text="", task="position", things=things, relation=relation)
        for relation in RELATIONS
    }
    scene = sample_scene(asked[drawn], np.random.default_rng(0))  # type: ignore[index]
    picture = render(scene)
    assert [relation for relation, caption in asked.items() if score(caption, picture)] == [drawn]


def test_one_object_more_than_asked_for_does_not_count() -> None:
    caption = Caption(text="", task="single_object", things=(Thing(shape="circle"),))
    assert score(caption, render([item("circle", "red", 16)])) == 1
    assert score(caption, render([item("circle", "red", 16), item("triangle", "blue", 48)])) == 0


@pytest.mark.parametrize("task", TASKS)
def test_blank_and_noise_fit_no_caption(task: str) -> None:
    rng = np.random.default_rng(2)
    noise = rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    for _ in range(10):
        caption = sample_caption(task, rng)  # type: ignore[arg-type]
        assert score(caption, render([])) == score(caption, noise) == 0


@pytest.mark.parametrize("color", [*COLORS.values(), (128, 128, 128), (0, 0, 0)])
def test_a_picture_of_one_flat_color_shows_no_square(color: tuple[int, int, int]) -> None:
    flat = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), color, dtype=np.uint8)
    square = Caption(text="", task="single_object", things=(Thing(shape="square"),))
    assert score(square, flat) == 0
