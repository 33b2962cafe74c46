"""A batch follows from the seed and the step alone, whoever asks for which of its rows."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.toolchain.data.conftest import folder, picture
from toolchain.analysis import velocity_errors
from toolchain.checkpoints import Checkpoints
from toolchain.data.feed import Feed, open_feed
from toolchain.data.precompute import Settings, precompute
from toolchain.data.shards import Precomputed, open_precomputed
from toolchain.data.sources import open_source
from toolchain.distill import DistillRecipe, InTurn, Lesson, distill_
from toolchain.errors import ToolchainError
from toolchain.families import Model, open_model
from toolchain.geometry import Unit
from toolchain.losses import LossWeights
from toolchain.optimize import Schedule
from toolchain.plan import CompressionPlan
from toolchain.progress import silent
from toolchain.prune import prune
from toolchain.trajectories import sample_states

SETTINGS = Settings(batch_size=2, shard_rows=2, dtype="float32")


@pytest.fixture(scope="session")
def pictures(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Precomputed:
    """Six pictures, two of which are wide."""
    root = tmp_path_factory.mktemp("pictures")
    colors = ("red", "green", "blue", "black", "white", "pink")
    files = {
        f"{color}.png": picture(color, (80, 48) if color in ("red", "blue") else (8, 8)) for color in colors
    }
    source = folder(root / "set", files, {f"{color}.png": f"a {color} square" for color in colors})
    precompute(open_model(str(tiny_path)), open_source(source), root / "out", SETTINGS, bar=silent)
    return open_precomputed(root / "out")


@pytest.fixture(scope="session")
def painted(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Precomputed:
    root = tmp_path_factory.mktemp("painted")
    (root / "p.txt").write_text("a cat\na dog\n")
    precompute(open_model(str(tiny_path)), open_source(root / "p.txt"), root / "out", SETTINGS, bar=silent)
    return open_precomputed(root / "out")


def same(first: object, second: object) -> bool:
    return all(
        torch.equal(mine, other)
        for mine, other in zip(flat(first), flat(second), strict=True)
        if mine is not None and other is not None
    )


def flat(batch: object) -> list[torch.Tensor | None]:
    latents, timesteps, text, velocities = batch  # type: ignore[misc]
    return [latents, timesteps, text.tokens_BTJ, text.pooled_BP, velocities]


def test_a_batch_is_of_one_size_and_always_full(tiny: Model, pictures: Precomputed) -> None:
    feed = open_feed(pictures, tiny)
    seen = set()
    for step in range(12):
        rows = feed.rows(0, step, 5)
        assert len(set(rows.tolist())) == 5
        latents, timesteps, text, velocities = feed.batch(rows, (0, step))
        assert len(latents) == len(timesteps) == len(text.pooled_BP) == 5
        assert velocities is None
        seen.add(tuple(latents.shape[2:]))
    assert seen == {(6, 10), (8, 8)}
    assert not torch.equal(feed.rows(0, 1, 5), feed.rows(0, 2, 5))


def test_processes_that_share_a_batch_get_its_rows(tiny: Model, pictures: Precomputed) -> None:
    feed = open_feed(pictures, tiny)
    rows = feed.rows(3, 7, 6)
    whole = flat(feed.batch(rows, (3, 7)))
    for rank in range(2):
        for mine, all_of_it in zip(flat(feed.batch(rows[rank::2], (3, 7))), whole, strict=True):
            assert mine is all_of_it or torch.equal(mine, all_of_it[rank::2])  # type: ignore[index]
    assert same(open_feed(pictures, tiny).batch(rows, (3, 7)), feed.batch(rows, (3, 7)))
    later = feed.batch(rows, (3, 8))
    assert not torch.equal(later[0], feed.batch(rows, (3, 7))[0])


def test_noise_is_mixed_in_as_much_as_its_timestep_says(tiny: Model, pictures: Precomputed) -> None:
    """What is left without the picture is noise of variance 1, at every step of the model's own sampling."""
    feed = open_feed(pictures, tiny)
    clean = {tuple(rows[torch.tensor([0])].shape[2:]): rows.whole() for rows in pictures.pairs()[1]}
    noise, times = [], []
    for step in range(40):
        rows = feed.rows(0, step, 8)
        latents, timesteps, _, _ = feed.batch(rows, (0, step))
        share = (timesteps / 1000)[:, None, None, None]
        # One of the pictures is the one; it leaves the least.
        left = (latents[:, None] - (1 - share)[:, None] * clean[tuple(latents.shape[2:])]) / share[:, None]
        sizes = left.square().mean((2, 3, 4))
        noise += left[torch.arange(8), sizes.argmin(1)].flatten(1).std(1).tolist()
        times += timesteps.tolist()
    assert max(abs(value - 1) for value in noise) < 0.25
    last, first = sample_states(tiny, ["a cat"], seed=0).timesteps.unique().tolist()
    assert set(times) == {last, first}
    assert 0.4 < times.count(last) / len(times) < 0.6


def test_a_tenth_of_captions_is_empty_where_the_model_is_guided(tiny: Model, pictures: Precomputed) -> None:
    unguided = replace(tiny, defaults=replace(tiny.defaults, guidance_scale=1.0))
    empty = pictures.texts.encode([""])
    assert empty is not None
    shares = []
    for model in (tiny, unguided):
        feed = open_feed(pictures, model)
        batches = [feed.batch(feed.rows(0, step, 16), (0, step)) for step in range(20)]
        text = torch.cat([batch[2].tokens_BTJ for batch in batches])
        shares.append(float((text == empty.tokens_BTJ).all(2).all(1).float().mean()))
    assert 0.04 < shares[0] < 0.18
    assert shares[1] == 0


def test_states_on_disk_teach_what_states_in_memory_do(
    tiny: Model, painted: Precomputed, plan: CompressionPlan
) -> None:
    in_memory = sample_states(tiny, ["a cat", "a dog"], seed=(0, 0))
    first, second = (taught(tiny, plan, feed) for feed in (in_memory, open_feed(painted, tiny)))
    for name, item in first.items():
        # Captions were encoded in other batches, which shows in the last bits.
        torch.testing.assert_close(second[name], item, rtol=1e-4, atol=1e-5)


def test_what_the_student_is_judged_on_is_not_taught(
    tiny: Model, painted: Precomputed, pictures: Precomputed
) -> None:
    """Under guidance a prompt's states with the empty caption go too."""
    assert (len(open_feed(painted, tiny)), len(open_feed(painted, tiny, without=["a cat"]))) == (8, 4)
    few = open_feed(pictures, tiny, without=["a red square", "a blue square"])
    assert len(few) == 4
    assert {few.batch(few.rows(0, step, 2), (0, step))[0].shape[2:] for step in range(9)} == {(8, 8)}
    assert few.digest() != open_feed(pictures, tiny).digest()
    with pytest.raises(ToolchainError, match="nothing but the captions that the student is judged on"):
        open_feed(painted, tiny, without=["a cat", "a dog"])


def test_data_of_another_model_is_refused(tiny: Model, painted: Precomputed, pictures: Precomputed) -> None:
    """Latents are the autoencoder's, states the transformer's too."""
    tiny.pipeline.transformer.proj_out.bias.data += 1
    open_feed(pictures, tiny)
    with pytest.raises(ToolchainError, match="its transformer differ"):
        open_feed(painted, tiny)
    tiny.pipeline.vae.encoder.conv_in.bias.data += 1
    longer = replace(tiny, defaults=replace(tiny.defaults, max_sequence_length=8))
    with pytest.raises(ToolchainError, match="its vae, max_sequence_length differ"):
        open_feed(pictures, longer)


RECIPE = DistillRecipe(
    schedule=Schedule(steps=4, learning_rate=1e-3, warmup_steps=0),
    batch_size=3,
    losses=LossWeights(features=0.0),
    precision="float32",
)


@pytest.fixture
def plan(tiny: Model) -> CompressionPlan:
    strength = {"embedders": 0.0, "0": 0.0, "1": 0.0, "2": 0.0, "4": 1.0, "5": 1.0, "head": 1.0}
    return CompressionPlan(
        model="tiny",
        geometry=tiny.geometry,
        semantics="zero",
        rule="manual",
        removed=(Unit.parse("3"),),
        strength=strength,
        asked={},
    )


def taught(
    model: Model, plan: CompressionPlan, feed: Feed, recipe: DistillRecipe = RECIPE, **options: object
) -> dict[str, torch.Tensor]:
    student = prune(model, plan, share_prefix=True)
    distill_(model, student, plan, feed, recipe, **options)  # type: ignore[arg-type]
    weights: dict[str, torch.Tensor] = student.pipeline.transformer.state_dict()
    return {name: item.clone() for name, item in weights.items()}


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("features", [0.0, 0.1])
def test_the_teacher_answers_where_its_velocities_are_not_known(
    tiny: Model, pictures: Precomputed, plan: CompressionPlan, features: float
) -> None:
    feed = open_feed(pictures, tiny)
    teacher = copy.deepcopy(tiny)
    student = prune(tiny, plan, share_prefix=True)
    recipe = replace(RECIPE, losses=LossWeights(features=features))
    lesson = Lesson(tiny.mmdit, student.mmdit, plan, recipe)
    batch = lesson.batch(feed, lesson.rows(feed, 2), 2)
    answer = lesson.ask([batch])[0]
    velocity = teacher.mmdit.velocity(batch.latents, batch.timesteps, batch.text)
    torch.testing.assert_close(answer.velocities, velocity)
    known = replace(batch, velocities=velocity)
    torch.testing.assert_close(lesson.loss(batch, answer), lesson.loss(known, lesson.ask([known])[0]))
    assert lesson.ask([known])[0].velocities is None


def test_pictures_teach_what_the_student_is_judged_by(
    tiny: Model, pictures: Precomputed, plan: CompressionPlan
) -> None:
    """States of the teacher's sampling. Were noise of its last step not drawn, a third would be left."""
    states = sample_states(tiny, ["a red square", "a blue square", "a green square"], seed=1)
    student = prune(tiny, plan, share_prefix=True)
    before = velocity_errors(student.mmdit, states).mean()
    schedule = Schedule(steps=60, learning_rate=1e-3, warmup_steps=10, cooldown=0.7)
    recipe = replace(RECIPE, batch_size=8, schedule=schedule)
    distill_(tiny, student, plan, open_feed(pictures, tiny), recipe)
    assert velocity_errors(student.mmdit, states).mean() < before / 4


def test_taking_turns_teaches_the_same_of_pictures(
    tiny: Model, pictures: Precomputed, plan: CompressionPlan, tmp_path: Path
) -> None:
    feed = open_feed(pictures, tiny)
    both = taught(tiny, plan, feed)
    assert same_weights(both, taught(tiny, plan, feed, in_turn=InTurn(steps=3, directory=tmp_path)))


def test_a_training_on_pictures_goes_on_where_it_was(
    tiny: Model, pictures: Precomputed, plan: CompressionPlan, tmp_path: Path
) -> None:
    feed = open_feed(pictures, tiny)
    recipe = replace(RECIPE, schedule=replace(RECIPE.schedule, checkpoint_every=2))

    def stop(step: int, _: float) -> None:
        if step == 2:
            raise KeyboardInterrupt

    checkpoints = Checkpoints(directory=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        taught(tiny, plan, feed, recipe, checkpoints=checkpoints, on_step=stop)
    resumed = taught(tiny, plan, feed, recipe, checkpoints=checkpoints)
    assert same_weights(resumed, taught(tiny, plan, feed, recipe))


def test_outputs_of_the_prefix_cannot_be_kept_for_pictures(
    tiny: Model, pictures: Precomputed, plan: CompressionPlan, tmp_path: Path
) -> None:
    with pytest.raises(ToolchainError, match="noise is drawn anew for every picture at every step"):
        taught(tiny, plan, open_feed(pictures, tiny), cache_prefix=tmp_path / "prefix")
    assert list(tmp_path.iterdir()) == []
