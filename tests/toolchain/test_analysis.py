"""The harm of removing a block or a component, on a tiny pipeline with random weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from toolchain.analysis import Rescorer, analyze, num_units, removals, velocity_errors
from toolchain.errors import ToolchainError
from toolchain.families import Model
from toolchain.families.mmdit import MMDiT
from toolchain.geometry import Semantics, Unit
from toolchain.metrics import PictureMetric
from toolchain.metrics.velocity import Velocity
from toolchain.plan import Harm, Sensitivity
from toolchain.trajectories import States, sample_states

PROMPTS = ["a red circle", "two squares"]


@dataclass(frozen=True, kw_only=True)
class Brightness(PictureMetric):
    """Mean of all pixels."""

    name = "brightness"

    def check(self, prompts: Sequence[str]) -> None:
        """Any prompt will do."""

    def scores(self, prompts: Sequence[str], pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """Of each picture."""
        return pictures.mean(axis=(1, 2, 3), dtype=np.float64)


def harms(found: Sensitivity) -> dict[tuple[Unit, ...], Harm]:
    return {item.removed: item for item in found.harms}


def units(text: str) -> tuple[Unit, ...]:
    return tuple(map(Unit.parse, text.split("+")))


def test_every_block_and_component_is_removed_and_a_context_mlp_that_is_not_there_is_not(tiny: Model) -> None:
    wanted = {"+".join(map(str, item)) for item in removals(tiny.geometry)}
    assert {"0", "5", "0.attn", "0.ff_context", "5.attn", "5.ff", "5.norm1_context"} < wanted
    assert "5.ff_context" not in wanted
    assert len(wanted) == 6 + 5 * 5 + 4
    assert {str(item[0]) for item in removals(tiny.geometry, components=False)} == set("012345")


def test_pairs_are_of_one_block_or_of_two_blocks_that_follow_each_other(tiny: Model) -> None:
    pairs = [item for item in removals(tiny.geometry, pairs=True) if len(item) == 2]
    assert [item for item in pairs if item[0].component is None] == [
        (Unit(index), Unit(index + 1)) for index in range(5)
    ]
    inside = [item for item in pairs if item[0].component is not None]
    assert all(first.block == second.block and second.component for first, second in inside)
    assert len(inside) == 5 * 10 + 6


@pytest.mark.parametrize("semantics", ["zero", "identity"])
def test_a_harm_is_the_error_of_a_model_without_the_unit_on_the_states_of_all_seeds(
    tiny: Model, semantics: Semantics
) -> None:
    before = {name: item.clone() for name, item in tiny.pipeline.transformer.state_dict().items()}
    found = analyze(tiny, Velocity(), PROMPTS, seeds=(3, 4), semantics=semantics, pairs=True, batch_size=3)
    samples = [sample_states(tiny, PROMPTS, seed=seed) for seed in (3, 4)]
    for text in ("2", "5", "0.norm1", "3.ff", "5.attn", "1+2", "4.attn+4.ff"):
        view = tiny.mmdit.without(units(text), semantics)
        errors = torch.cat([velocity_errors(view, states) for states in samples])
        assert harms(found)[units(text)].harm == pytest.approx(float(errors.mean()), rel=1e-3), text
    assert found.baseline < 1e-10 < min(item.harm for item in found.harms)
    assert (found.metric, found.semantics, found.model) == ("velocity", semantics, tiny.source)
    after = tiny.pipeline.transformer.state_dict()
    assert all(torch.equal(item, after[name]) for name, item in before.items())


def test_the_standard_error_is_over_trajectories(tiny: Model) -> None:
    found = analyze(tiny, Velocity(), PROMPTS, seeds=(0, 1), components=False)
    means = []
    for seed in (0, 1):
        states = sample_states(tiny, PROMPTS, seed=seed)
        errors = velocity_errors(tiny.mmdit.without([Unit(2)], "zero"), states)
        for row in range(2):
            mine = errors[states.prompt_index[1::2] == row]
            assert len(mine) == 2  # steps
            means.append(float(mine.mean()))
    expected = np.std(means, ddof=1) / 4**0.5
    assert harms(found)[Unit(2),].standard_error == pytest.approx(expected, rel=1e-3)


def test_similarity_and_magnitude_are_those_of_each_block(tiny: Model, states: States) -> None:
    found = analyze(tiny, Velocity(), PROMPTS, seeds=(0, 1), components=False)
    assert found.similarity is not None
    assert found.magnitude is not None
    values = torch.cat([item.flatten() for item in tiny.mmdit.blocks[4].parameters()])
    assert found.magnitude[4] == pytest.approx(float(values.square().mean().sqrt()), rel=1e-5)
    cosines: list[float] = []
    for seed in (0, 1):
        latents, timesteps, text, _ = sample_states(tiny, PROMPTS, seed=seed).batch(slice(None))
        with torch.no_grad():
            before = tiny.mmdit.begin(latents, timesteps, text)
            after = tiny.mmdit.apply(tiny.mmdit.blocks[0], before)
        x, y = before.image_BND, after.image_BND
        cosines += ((x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)).flatten().tolist()
    assert found.similarity[0] == pytest.approx(np.mean(cosines), rel=1e-4)
    assert len(found.similarity) == len(found.magnitude) == 6


def test_pictures_are_painted_from_the_same_noise_and_harm_is_what_the_score_loses(tiny: Model) -> None:
    found = analyze(tiny, Brightness(), PROMPTS, seeds=(0, 1), components=False, batch_size=4)
    scores = []
    for painter in (tiny, without(tiny, "3")):
        for seed in (0, 1):
            noise = np.random.default_rng(seed).standard_normal((2, *tiny.latent_shape), dtype=np.float32)
            scores.append(Brightness().scores(PROMPTS, painter.paint(PROMPTS, noise)))
    whole, pruned = np.concatenate(scores[:2]), np.concatenate(scores[2:])
    assert found.baseline == pytest.approx(whole.mean())
    harm = harms(found)[Unit(3),]
    assert harm.harm == pytest.approx((whole - pruned).mean())
    assert harm.standard_error == pytest.approx((whole - pruned).std(ddof=1) / 2)
    assert found.metric == "brightness"
    assert found.similarity is not None


def without(model: Model, text: str) -> Model:
    from dataclasses import replace

    transformer = model.mmdit.without(units(text), "zero").transformer
    parts = {**model.pipeline.components, "transformer": transformer}
    pipeline = type(model.pipeline)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return replace(model, pipeline=pipeline)


def test_what_enters_a_block_is_computed_once_for_all_that_is_removed_there(
    tiny: Model, count: Callable[[], int]
) -> None:
    analyze(tiny, Velocity(), PROMPTS, seeds=(0,), components=False)
    # Two steps of sampling through all blocks, the prefix once, and behind each block what follows it.
    assert count() == 2 * 6 + 6 + (5 + 4 + 3 + 2 + 1)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch, tiny: Model) -> Callable[[], int]:
    """How many blocks ran since it was last asked."""
    calls: list[None] = []
    kind: type[MMDiT] = type(tiny.mmdit)
    apply = kind.apply

    def counted(self: MMDiT, block: torch.nn.Module, streams: object) -> object:
        calls.append(None)
        return apply(self, block, streams)  # type: ignore[arg-type]

    def asked() -> int:
        number = len(calls)
        calls.clear()
        return number

    monkeypatch.setattr(kind, "apply", counted)
    return asked


@pytest.mark.parametrize("metric", [Velocity(), Brightness()])
def test_an_analysis_that_was_stopped_goes_on_and_ends_as_an_undisturbed_one(
    tiny: Model, tmp_path: Path, metric: Velocity | Brightness
) -> None:
    settings = {"seeds": (0, 1), "components": False, "batch_size": 4}
    steps: list[None] = []

    def stop() -> None:
        steps.append(None)
        if len(steps) == total // 2:
            raise KeyboardInterrupt

    total = num_units(tiny, metric, PROMPTS, **settings)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        analyze(tiny, metric, PROMPTS, **settings, work=tmp_path / "work", on_step=stop)  # type: ignore[arg-type]
    kept = {path: path.read_bytes() for path in (tmp_path / "work").iterdir()}
    assert len(kept) > 4
    steps.clear()
    total = 10**9
    resumed = analyze(tiny, metric, PROMPTS, **settings, work=tmp_path / "work", on_step=stop)  # type: ignore[arg-type]
    assert resumed == analyze(tiny, metric, PROMPTS, **settings)  # type: ignore[arg-type]
    assert all(path.read_bytes() == text for path, text in kept.items())
    assert len(steps) == num_units(tiny, metric, PROMPTS, **settings)  # type: ignore[arg-type]


def test_what_was_finished_is_not_measured_again(
    tiny: Model, tmp_path: Path, count: Callable[[], int]
) -> None:
    first = analyze(tiny, Velocity(), PROMPTS, work=tmp_path, batch_size=8)
    everything = count()
    for lost in (*tmp_path.glob("seed-1-*-5.json"), *tmp_path.glob("seed-1-*-whole.json")):
        lost.unlink()
    assert analyze(tiny, Velocity(), PROMPTS, work=tmp_path, batch_size=8) == first
    assert 0 < count() < everything / 4
    assert analyze(tiny, Velocity(), PROMPTS, work=tmp_path, batch_size=8) == first
    assert count() == 0


def test_a_work_directory_of_other_settings_is_refused_and_the_setting_named(
    tiny: Model, tmp_path: Path
) -> None:
    analyze(tiny, Velocity(), PROMPTS, components=False, work=tmp_path)
    with pytest.raises(ToolchainError, match=r"seeds is \[0, 1\] there, \[0, 2\] now"):
        analyze(tiny, Velocity(), PROMPTS, components=False, work=tmp_path, seeds=(0, 2))
    with pytest.raises(ToolchainError, match="metric is 'velocity' there, 'brightness' now"):
        analyze(tiny, Brightness(), PROMPTS, components=False, work=tmp_path)
    with torch.no_grad():
        next(iter(tiny.mmdit.blocks[1].parameters())).add_(1.0)
    with pytest.raises(ToolchainError, match="weights is"):
        analyze(tiny, Velocity(), PROMPTS, components=False, work=tmp_path)


def test_a_directory_with_something_else_in_it_is_refused(tiny: Model, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ToolchainError, match=r"but no settings\.json of an analysis"):
        analyze(tiny, Velocity(), PROMPTS, work=tmp_path)


@pytest.mark.parametrize("metric", [Velocity(), Brightness()])
def test_a_teacher_that_gives_values_that_are_not_finite_is_refused(
    tiny: Model, metric: Velocity | Brightness
) -> None:
    with torch.no_grad():
        tiny.pipeline.transformer.proj_out.weight.fill_(float("nan"))
    with pytest.raises(ToolchainError, match="velocities that are not finite"):
        analyze(tiny, metric, PROMPTS)


def test_one_sample_is_refused_for_it_says_nothing_of_its_error(tiny: Model) -> None:
    with pytest.raises(ToolchainError, match="1 prompts with the seeds"):
        analyze(tiny, Velocity(), ["a circle"], seeds=(0,))
    with pytest.raises(ToolchainError, match="no seed twice"):
        analyze(tiny, Velocity(), PROMPTS, seeds=(0, 0))


def test_rescoring_gives_how_much_worse_the_error_gets(tiny: Model, states: States) -> None:
    removed = units("1+3.ff+3.attn")

    def error(*also: Unit) -> float:
        return float(velocity_errors(tiny.mmdit.without([*removed, *also], "zero"), states).mean())

    asked = units("0+3+5+0.attn+3.norm1+5.ff")
    found = Rescorer(tiny, states, "zero", batch_size=3)(removed, asked)
    assert tuple(found) == asked
    for unit in asked:
        assert found[unit] == pytest.approx(error(unit) - error(), rel=1e-3, abs=1e-6)


def test_rescoring_a_whole_model_gives_the_harms(tiny: Model) -> None:
    states = sample_states(tiny, PROMPTS, seed=0)
    found = harms(analyze(tiny, Velocity(), PROMPTS, seeds=(0,), components=False))
    again = Rescorer(tiny, states, "zero")((), [Unit(index) for index in range(6)])
    assert {(unit,): pytest.approx(value, rel=1e-4) for unit, value in again.items()} == {
        removed: item.harm for removed, item in found.items()
    }


def test_an_error_that_prompt_and_no_prompt_share_is_not_multiplied_by_guidance(states: States) -> None:
    wrong = torch.ones_like(states.velocities)
    assert torch.allclose(
        states.followed(states.velocities + wrong) - states.followed(states.velocities), wrong[::2], atol=1e-5
    )
    wrong[1::2] = 0
    assert torch.allclose(
        states.followed(states.velocities + wrong) - states.followed(states.velocities),
        (1 - 3.0) * wrong[::2],
        atol=1e-5,
    )


def test_both_rows_of_a_state_are_of_one_state_and_batches_keep_them_together(states: States) -> None:
    assert torch.equal(states.latents[0::2], states.latents[1::2])
    assert torch.equal(states.timesteps[0::2], states.timesteps[1::2])
    assert set(states.prompt_index[0::2].tolist()) == {2}  # the empty prompt comes last
    assert set(states.prompt_index[1::2].tolist()) == {0, 1}
    assert [(rows.start, rows.stop) for rows in states.batches(3)] == [(0, 2), (2, 4), (4, 6), (6, 8)]
