"""Contribution analysis: how much every block and component matters, by what the model does without it.

Velocities cost little to compare: what enters a block is computed once a batch, and everything that may be
removed there is removed from there on. Pictures have to be painted from nothing each time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from toolchain.errors import ToolchainError
from toolchain.families.mmdit import MMDiT, Streams
from toolchain.families.view import Model
from toolchain.geometry import Geometry, Semantics, Unit
from toolchain.metrics import PictureMetric, StateMetric
from toolchain.metrics.velocity import Velocity
from toolchain.pieces import Pieces
from toolchain.plan import Harm, Sensitivity
from toolchain.prefix import lent
from toolchain.processes import processes
from toolchain.trajectories import States, sample_states

Removal = tuple[Unit, ...]
OnStep = Callable[[], None]
_Samples = npt.NDArray[np.float64]

BATCH_SIZE = 64
"""States at once; half as many pictures, for guidance doubles them."""


def removals(geometry: Geometry, *, components: bool = True, pairs: bool = False) -> tuple[Removal, ...]:
    """What an analysis removes: every block, every component, and two at a time.

    Args:
        geometry: Of the model.
        components: Also the components of the blocks, not only whole blocks.
        pairs: Also every two blocks that follow each other and, with `components`, every two components
            of one block.
    """
    blocks = [Unit(index) for index in range(len(geometry.blocks))]
    units = geometry.units if components else ()
    found: list[Removal] = [(unit,) for unit in (*blocks, *units)]
    if pairs:
        found += pairwise(blocks)
        found += [pair for pair in combinations(units, 2) if pair[0].block == pair[1].block]
    return tuple(found)


def num_units(
    model: Model,
    metric: StateMetric | PictureMetric,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] = (0, 1),
    components: bool = True,
    pairs: bool = False,
    batch_size: int = BATCH_SIZE,
) -> int:
    """How often `analyze` calls `on_step`, given the same."""
    each = len(removals(model.geometry, components=components, pairs=pairs)) + 1
    batch_size = _aligned(model, batch_size)
    sampling = _sampling_steps(model, prompts, batch_size)
    batches = math.ceil(_num_states(model, prompts) / batch_size)
    if isinstance(metric, StateMetric):
        return len(seeds) * (sampling + batches * each)
    pictures = math.ceil(len(prompts) / _num_pictures(batch_size))
    return len(seeds) * pictures * each + sampling + batches


def analyze(
    model: Model,
    metric: StateMetric | PictureMetric,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] = (0, 1),
    semantics: Semantics = "zero",
    components: bool = True,
    pairs: bool = False,
    work: Path | None = None,
    batch_size: int = BATCH_SIZE,
    on_step: OnStep | None = None,
) -> Sensitivity:
    """Measure the harm of removing each block and each component alone.

    Args:
        model: The teacher; left as it is.
        metric: Judges velocities on the teacher's own trajectories, at all of their timesteps, or pictures.
        prompts: To sample or paint, once for each seed.
        seeds: Of the initial noise, which is the same for every removal.
        semantics: What a removed component leaves behind.
        components: See `removals`, as for `pairs`.
        pairs: Measure some pairs, too.
        work: A directory for finished pieces, made if missing and left in place: an analysis that was
            stopped goes on where it was when it is called again. None keeps them in memory.
        batch_size: States at once.
        on_step: Called `num_units` times.

    Returns:
        Harms with their standard errors: over trajectories for velocities, over pictures for scores.

    Raises:
        ToolchainError: Something given does not fit, `work` is that of another analysis, or the model
            gives values that are not finite.
    """
    if len(prompts) * len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise ToolchainError(
            f"an analysis of {len(prompts)} prompts with the seeds {list(seeds)} says nothing of its error: "
            "give two prompts or two seeds at least, and no seed twice"
        )
    if isinstance(metric, PictureMetric):
        metric.check(prompts)
    geometry, batch_size = model.geometry, _aligned(model, batch_size)
    magnitude = magnitudes(model)
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    settings = {
        "num_prompts": len(prompts),
        "prompts_sha256": digest,
        "seeds": list(seeds),
        "metric_options": metric.options,
        "generation": asdict(model.defaults),
    }
    finished = Pieces(
        work,
        settings
        | {
            "model": model.source,
            "weights": fingerprint(magnitude),
            "metric": metric.name,
            "semantics": semantics,
            "components": components,
            "pairs": pairs,
            "batch_size": batch_size,
        },
        work="an analysis",
    )
    wanted = removals(geometry, components=components, pairs=pairs)
    subject = _Subject(model, list(prompts), semantics, batch_size, finished, on_step or (lambda: None))
    if isinstance(metric, StateMetric):
        samples, similarity = subject.errors(metric, seeds, wanted)
        harms = {removal: samples[removal] for removal in wanted}  # an error is a harm already
    else:
        # No picture says what enters and leaves a block.
        _, similarity = subject.errors(Velocity(), seeds[:1], ())
        samples = subject.scores(metric, seeds, wanted)
        harms = {removal: samples[()] - samples[removal] for removal in wanted}
    return Sensitivity(
        model=model.source,
        geometry=geometry,
        semantics=semantics,
        metric=metric.name,
        baseline=float(samples[()].mean()),
        settings=settings,
        harms=tuple(
            Harm(
                removed=removal,
                harm=float(harm.mean()),
                standard_error=float(harm.std(ddof=1) / len(harm) ** 0.5),
            )
            for removal, harm in harms.items()
        ),
        similarity=similarity,
        magnitude=magnitude,
    )


def magnitudes(model: Model) -> tuple[float, ...]:
    """The root mean square of the weights of each block."""
    return tuple(_magnitude(block) for block in model.mmdit.blocks)


def fingerprint(magnitude: Iterable[float]) -> list[str]:
    """What tells one model's weights from another's: any change shows here, and none of the machine does."""
    return [f"{value:.5g}" for value in magnitude]


@torch.no_grad()
def velocity_errors(view: MMDiT, states: States, *, batch_size: int = BATCH_SIZE) -> torch.Tensor:
    """|v - v_teacher|² / |v_teacher|² of every state, v being what the sampler follows."""
    here = processes()

    def errors(rows: slice) -> torch.Tensor:
        latents, timesteps, text, said = states.batch(rows, device=here.device)
        found = states.followed(view.velocity(latents, timesteps, text))
        return Velocity().errors(found, states.followed(said)).cpu()

    with lent(view.transformer):
        return torch.cat(list(here.each(list(states.batches(batch_size)), errors)))


class Rescorer:
    """How much worse the velocity gets when one more unit goes, whatever has gone before.

    Args:
        model: The teacher.
        states: What to measure on.
        semantics: What a removed component leaves behind.
        batch_size: States at once.
    """

    def __init__(
        self, model: Model, states: States, semantics: Semantics, *, batch_size: int = BATCH_SIZE
    ) -> None:
        self._view, self._geometry = model.mmdit, model.geometry
        self._states, self._semantics, self._batch_size = states, semantics, batch_size

    @torch.no_grad()
    def __call__(self, removed: Removal, units: Sequence[Unit]) -> Mapping[Unit, float]:
        """The mean error without `removed` and one of `units`, less the one without `removed` alone."""
        totals = dict.fromkeys(units, 0.0)
        whole, last = 0.0, len(self._geometry.blocks)
        walk: _Walk | None = None

        def errors(piece: tuple[slice, int]) -> dict[Unit | None, float]:
            nonlocal walk
            rows, index = piece
            if walk is None or walk.rows != rows:
                walk = _Walk(thinned, self._states, rows)
            streams, error = walk.to(index), partial(self._error, walk.said)
            if index == last:
                return {None: error(self._view.end(streams))}
            here = [unit for unit in units if unit.block == index]
            return {unit: error(thinned.finish(streams, index, (unit,))) for unit in here}

        pieces = [
            (rows, index) for rows in self._states.batches(self._batch_size) for index in range(last + 1)
        ]
        with lent(self._view.transformer):
            # Only now, for what it cuts out of weights is where they are.
            thinned = _Thinned(self._view, self._geometry, self._semantics, removed)
            for found in processes().each(pieces, errors):
                for unit, error in found.items():
                    if unit is None:
                        whole += error
                    else:
                        totals[unit] += error
        count = len(self._states) // self._states.copies
        return {unit: (total - whole) / count for unit, total in totals.items()}

    def _error(self, said: torch.Tensor, found: torch.Tensor) -> float:
        errors = Velocity().errors(self._states.followed(found), self._states.followed(said))
        return float(errors.double().sum())


class _Thinned:
    """A model without some units, which can finish what it began without some more."""

    def __init__(
        self, view: MMDiT, geometry: Geometry, semantics: Semantics, removed: Iterable[Unit] = ()
    ) -> None:
        self.view, self._geometry, self._semantics = view, geometry, semantics
        self._removed = tuple(removed)
        self._blocks: list[nn.Module | None] = list(view.blocks)
        for index, names in geometry.components_removed(self._removed).items():
            self._blocks[index] = self._block(index, names)

    def apply(self, index: int, streams: Streams) -> Streams:
        """What leaves a block, or what is left of it."""
        block = self._blocks[index]
        return streams if block is None else self.view.apply(block, streams)

    def finish(self, streams: Streams, index: int, also: Removal) -> torch.Tensor:
        """The velocity from what enters block `index`, without units of it or of later blocks."""
        gone = self._geometry.components_removed((*self._removed, *also))
        blocks = list(self._blocks)
        for unit in also:
            blocks[unit.block] = self._block(unit.block, gone[unit.block])
        for block in blocks[index:]:
            if block is not None:
                streams = self.view.apply(block, streams)
        return self.view.end(streams)

    def _block(self, index: int, names: Collection[str]) -> nn.Module | None:
        if set(names) == set(self._geometry.blocks[index].components):
            return None
        return self.view.sparse_block(index, names, self._semantics)


class _Walk:
    """What enters the blocks of a model, one after the other, for some states."""

    def __init__(self, thinned: _Thinned, states: States, rows: slice) -> None:
        latents, timesteps, text, self.said = states.batch(rows, device=processes().device)
        self.rows, self._thinned, self._index = rows, thinned, 0
        self._streams = thinned.view.begin(latents, timesteps, text)

    def to(self, index: int) -> Streams:
        """What enters a block, none before those asked for already; behind the last one, what leaves it."""
        while self._index < index:
            self._streams = self._thinned.apply(self._index, self._streams)
            self._index += 1
        return self._streams


class _Subject:
    """A model under analysis; every finished piece of work is kept and not done again."""

    def __init__(
        self,
        model: Model,
        prompts: list[str],
        semantics: Semantics,
        batch_size: int,
        finished: Pieces,
        on_step: OnStep,
    ) -> None:
        self._model, self._prompts, self._semantics = model, prompts, semantics
        self._batch_size, self._finished, self._on_step = batch_size, finished, on_step
        self._whole = _Thinned(model.mmdit, model.geometry, semantics)

    def errors(
        self, metric: StateMetric, seeds: Sequence[int], wanted: Sequence[Removal]
    ) -> tuple[dict[Removal, _Samples], tuple[float, ...]]:
        """Mean errors of the trajectories by removal, `()` among them, and the similarity of each block."""
        num_states, num_blocks = _num_states(self._model, self._prompts), len(self._model.geometry.blocks)
        starts = range(0, num_states, self._batch_size)
        pieces = (*map(str, range(num_blocks)), "whole")
        errors: dict[Removal, list[_Samples]] = {removal: [] for removal in ((), *wanted)}
        similarity = []
        for seed in seeds:
            names = {start: [f"seed-{seed}-state-{start}-{piece}" for piece in pieces] for start in starts}
            todo = [start for start in starts if not all(name in self._finished for name in names[start])]
            self._skip((len(starts) - len(todo)) * (len(wanted) + 1))
            if todo:
                states = self._sample(seed)
                for start in todo:
                    rows = slice(start, start + self._batch_size)
                    self._measure(metric, states, rows, wanted, names[start])
            else:
                self._skip(_sampling_steps(self._model, self._prompts, self._batch_size))
            found = [[self._finished[name] for name in names[start]] for start in starts]
            owner = np.concatenate([batch[-1]["trajectory"] for batch in found])
            for removal, samples in errors.items():
                piece = removal[0].block if removal else -1
                each = np.concatenate([batch[piece]["errors"][_text(removal)] for batch in found])
                samples.append(np.bincount(owner, weights=each) / np.bincount(owner))
            similarity += [[piece["similarity"] for piece in batch[:-1]] for batch in found]
        means = np.concatenate([np.array(batch) for batch in similarity], axis=1).mean(axis=1)
        return {key: np.concatenate(value) for key, value in errors.items()}, tuple(map(float, means))

    def scores(
        self, metric: PictureMetric, seeds: Sequence[int], wanted: Sequence[Removal]
    ) -> dict[Removal, _Samples]:
        """Of every picture by removal, `()` among them, in the same order."""
        shape = (len(self._prompts), *self._model.latent_shape)
        size = _num_pictures(self._batch_size)
        starts = range(0, len(self._prompts), size)
        names = {removal: f"scores-{_text(removal) or 'whole'}" for removal in ((), *wanted)}

        def judge(removal: Removal) -> list[float]:
            painter = self._without(removal)
            scores: list[float] = []
            for seed in seeds:
                noise = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
                for start in starts:
                    batch = self._prompts[start : start + size]
                    pictures = painter.paint(batch, noise[start : start + size])
                    scores += metric.scores(batch, pictures).tolist()
                    self._on_step()
            if not np.isfinite(scores).all():
                raise ToolchainError(
                    f"the metric {metric.name!r} gives scores that are not finite {_said(removal)}"
                )
            return scores

        todo = [removal for removal, name in names.items() if name not in self._finished]
        self._skip((len(names) - len(todo)) * len(seeds) * len(starts))
        here = processes()
        for turn, (removal, scores) in enumerate(zip(todo, here.each(todo, judge), strict=True)):
            self._finished[names[removal]] = {"scores": scores}
            if not here.owns(turn):
                self._skip(len(seeds) * len(starts))
        return {removal: np.array(self._finished[name]["scores"]) for removal, name in names.items()}

    def _sample(self, seed: int) -> States:
        return sample_states(
            self._model,
            self._prompts,
            seed=seed,
            batch_size=_num_pictures(self._batch_size),
            on_step=self._on_step,
        )

    @torch.no_grad()
    def _measure(
        self,
        metric: StateMetric,
        states: States,
        rows: slice,
        wanted: Sequence[Removal],
        names: Sequence[str],
    ) -> None:
        here = [
            [removal for removal in wanted if removal[0].block == index] for index in range(len(names) - 1)
        ]
        here.append([()])

        def errors(removal: Removal, velocity: torch.Tensor) -> list[float]:
            found = metric.errors(states.followed(velocity), states.followed(walk.said))
            if not torch.isfinite(found).all():
                raise ToolchainError(
                    f"{self._model.source} gives velocities that are not finite {_said(removal)}"
                )
            self._on_step()
            return [float(value) for value in found]

        def measure(index: int) -> dict[str, Any]:
            entering = walk.to(index)
            if index == len(names) - 1:
                return {
                    "errors": {_text(()): errors((), self._model.mmdit.end(entering))},
                    # The second row of a guided state is the one with its own prompt.
                    "trajectory": states.prompt_index[rows][states.copies - 1 :: states.copies].tolist(),
                }
            found = {
                _text(removal): errors(removal, self._whole.finish(entering, index, removal))
                for removal in here[index]
            }
            # One cosine for every image token, their mean for every state.
            leaving = walk.to(index + 1)
            cosine = F.cosine_similarity(entering.image_BND.float(), leaving.image_BND.float(), dim=-1)
            return {"errors": found, "similarity": [float(value) for value in cosine.mean(1)]}

        todo = [index for index, name in enumerate(names) if name not in self._finished]
        self._skip(sum(len(items) for index, items in enumerate(here) if index not in todo))
        shared = processes()
        with lent(self._model.mmdit.transformer):
            walk = _Walk(self._whole, states, rows)
            for turn, (index, piece) in enumerate(zip(todo, shared.each(todo, measure), strict=True)):
                self._finished[names[index]] = piece
                if not shared.owns(turn):
                    self._skip(len(here[index]))

    def _without(self, removal: Removal) -> Model:
        if not removal:
            return self._model
        teacher = self._model.pipeline
        transformer = self._model.mmdit.without(removal, self._semantics).transformer
        pipeline = type(teacher)(**{**teacher.components, "transformer": transformer})
        pipeline.set_progress_bar_config(disable=True)
        return replace(self._model, pipeline=pipeline)

    def _skip(self, count: int) -> None:
        for _ in range(count):
            self._on_step()


def _aligned(model: Model, batch_size: int) -> int:
    """With guidance a state takes two rows."""
    return batch_size + batch_size % 2 if model.guided else batch_size


def _num_states(model: Model, prompts: Sequence[str]) -> int:
    return len(prompts) * model.defaults.num_inference_steps * (2 if model.guided else 1)


def _num_pictures(batch_size: int) -> int:
    return max(1, batch_size // 2)


def _sampling_steps(model: Model, prompts: Sequence[str], batch_size: int) -> int:
    return math.ceil(len(prompts) / _num_pictures(batch_size)) * model.defaults.num_inference_steps


def _magnitude(block: nn.Module) -> float:
    squares = [item.detach().double().square().sum() for item in block.parameters()]
    return math.sqrt(float(sum(squares)) / sum(item.numel() for item in block.parameters()))


def _text(removal: Removal) -> str:
    return "+".join(map(str, removal))


def _said(removal: Removal) -> str:
    return f"without {_text(removal)}" if removal else "and nothing is removed: its weights are damaged"
