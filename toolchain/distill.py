"""Teaching a student to answer as its teacher did: one loop for all families.

Both models begin alike: up to the first block that the plan changes or lets learn they are one and the same
storage. That prefix is computed once and without gradients; then the rest of the teacher, if its features
are asked for, and the rest of the student go on from there, each for itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

from toolchain.checkpoints import Checkpoints
from toolchain.data.feed import Feed
from toolchain.errors import ToolchainError
from toolchain.families.mmdit import MMDiT, Streams, TextStates
from toolchain.families.view import Model
from toolchain.losses import LossWeights, feature_loss, output_loss
from toolchain.optimize import Checks, Schedule, optimize_
from toolchain.plan import EMBEDDERS, HEAD, CompressionPlan
from toolchain.prefix import (
    Resting,
    digest,
    lent,
    moved,
    read_stream_cache,
    storage_key,
    tensors_of,
    write_stream_cache,
)
from toolchain.processes import processes
from toolchain.together import gradients_held, trained_together, whole

Feature = tuple[torch.Tensor, torch.Tensor | None]
"""Image and text behind a block; no text behind one that ends it."""


@dataclass(frozen=True, kw_only=True)
class DistillRecipe:
    """What is learned, and how."""

    schedule: Schedule
    batch_size: int
    seed: int = 0
    losses: LossWeights = field(default_factory=LossWeights)
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Of matrix products; weights that learn, and their updates, are float32 in either case."""
    checkpointing: bool = False
    """Keep the inputs of blocks only, and compute the rest again for the gradient: a third more time for the
    student's part, and the memory of one block instead of all. What is learned stays the same."""
    accumulate: int = 1
    """Parts in which a process takes its share of a batch, one after the other: the memory of one part. What
    is learned stays the same."""

    def __post_init__(self) -> None:
        for name, value in (("batch size", self.batch_size), ("number of parts of a batch", self.accumulate)):
            if value < 1:
                raise ToolchainError(f"the {name} is {value}; it is at least 1")
        if self.precision not in ("bfloat16", "float32"):
            raise ToolchainError(f"unknown precision {self.precision!r}; there are bfloat16 and float32")


@dataclass(frozen=True, kw_only=True)
class InTurn:
    """Teacher and student take turns in memory: one answers for some steps, then the other learns them."""

    steps: int
    """A turn. The teacher's answers for so many steps are held in the machine's memory; each of its blocks
    comes to the device once a turn, and is there alone."""
    directory: Path
    """Where its weights rest meanwhile, in a file that vanishes by itself; it needs room for them."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a student is given of its teacher for one batch."""

    streams: Streams | None
    """Behind the shared prefix; None if there is none."""
    features: list[Feature]
    """Of each of the student's blocks behind the prefix; empty if they are not asked for."""
    velocities: torch.Tensor | None = None
    """The teacher's, where they count and do not come with the states."""


def distill_(
    teacher: Model,
    student: Model,
    plan: CompressionPlan,
    states: Feed,
    recipe: DistillRecipe,
    *,
    cache_prefix: Path | None = None,
    cache_dtype: torch.dtype | None = None,
    in_turn: InTurn | None = None,
    checkpoints: Checkpoints | None = None,
    checks: Checks | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> int:
    """Train a student's weights in place, each as strongly as the plan says.

    Everything runs where this process computes; weights may be anywhere at the start, and are there again at
    the end. Several processes teach one student, each in its share of every batch.

    Args:
        teacher: Left as it is. It may be held in 16 bits, and its student's prefix with it.
        student: `prune(teacher, plan, share_prefix=True)`; weights that learn become float32.
        plan: Strength 0 freezes; any other is the share of the learning rate.
        states: What it is taught in.
        recipe: What is learned, and how.
        cache_prefix: A file the prefix's outputs are read from, made if it is not there. The prefix itself
            leaves memory for good, for a nameless file in the same directory. So does the rest of the
            teacher where features count nothing.
        cache_dtype: What new outputs are stored in; by default the recipe's precision, which loses nothing.
        in_turn: Let the teacher leave memory while the student learns.
        checkpoints: As `optimize_` takes it, and `checks`.
        on_step: Called with the step's number and its loss.

    Returns:
        As `optimize_` does.

    Raises:
        ToolchainError: The student is not of this teacher and plan, the cache or the checkpoint is of another
            training, or the loss is no longer finite.
    """
    if cache_prefix is not None and in_turn is not None:
        raise ToolchainError(
            "outputs of the prefix are either kept for all states (cache_prefix) or for a few steps (in_turn)"
        )
    if in_turn is not None and in_turn.steps < 1:
        raise ToolchainError(f"a turn is {in_turn.steps} steps long; it is at least 1")
    rests = cache_prefix is not None or in_turn is not None
    check_shares(recipe, len(states.rows(recipe.seed, 0, recipe.batch_size)), rests=rests)
    whole_lesson = lesson = Lesson(teacher.mmdit, student.mmdit, plan, recipe)
    resting: list[torch.Tensor] = []
    if rests:
        resting = lesson.teachers_own(prefix_only=cache_prefix is not None and recipe.losses.features > 0)
    answer: Callable[[int, Batch], Answer] | None = None

    @torch.no_grad()
    def bring_home() -> None:
        pairs = (view.transformer.parameters() for view in (whole_lesson.student, lesson.student))
        for item, learned in zip(*pairs, strict=True):
            if learned is not item and learned.requires_grad:
                item.copy_(whole(learned))

    def harm(step: int) -> float:
        assert checks is not None
        bring_home()
        return checks.harm(step)

    with ExitStack() as stack:
        if processes().sharded:
            lesson = lesson.twin()
        else:
            models = (teacher.pipeline.transformer, student.pipeline.transformer)
            everything = {id(item): item for model in models for item in tensors_of(model)}
            stack.enter_context(lent(*(everything[key] for key in everything.keys() - set(map(id, resting)))))
        if cache_prefix is not None:
            answer = _from_cache(lesson, states, cache_prefix, cache_dtype, resting, stack)
        elif in_turn is not None:
            answer = _in_turn(lesson, states, in_turn, resting, stack)

        def loss_of(batch: Batch, answer: Answer | None) -> torch.Tensor:
            return lesson.loss(batch, answer or lesson.ask([batch])[0])

        unknown = recipe.losses.output > 0 and not states.fixed
        loss = trained_together(loss_of, *lesson.used(velocities=unknown))

        def loss_at(part: int) -> torch.Tensor:
            batch = lesson.batch(states, lesson.rows(states, part), part)
            return loss(batch, answer and answer(part, batch))

        steps = optimize_(
            lesson.student.transformer,
            loss_at,
            recipe.schedule,
            parts=recipe.accumulate,
            holding=lambda: gradients_held(loss),
            strength=lesson.strength,
            belongs_to=_belongs_to(plan, states, recipe) if checkpoints else None,
            checkpoints=checkpoints,
            checks=checks and replace(checks, harm=harm),
            on_step=on_step,
        )
        bring_home()
    return steps


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some states on the device."""

    latents: torch.Tensor
    timesteps: torch.Tensor
    text: TextStates
    velocities: torch.Tensor | None
    """The teacher's, where they are known beforehand."""


class Lesson:
    """A teacher and a student, aligned: the student's block k is the teacher's block `kept_blocks[k]`.

    Making one freezes and unfreezes the student's weights as the plan says.
    """

    def __init__(self, teacher: MMDiT, student: MMDiT, plan: CompressionPlan, recipe: DistillRecipe) -> None:
        self.teacher, self.student, self.plan, self.recipe = teacher, student, plan, recipe
        if len(student.blocks) != len(plan.kept_blocks):
            raise ToolchainError(
                f"the student has {len(student.blocks)} blocks, but the plan leaves {len(plan.kept_blocks)}; "
                "distil what prune made of this plan"
            )
        if teacher.transformer.dtype == torch.float16 and recipe.precision == "bfloat16":
            raise ToolchainError(
                "the teacher is held in float16, and products of training are bfloat16, which do not mix; "
                "open it in float32"
            )
        # The student's last block is its own: where all after it went, it was cut to be the last.
        self.num_shared = min(plan.shared_prefix, len(student.blocks) - 1)
        """Blocks of the prefix, to which the embedders belong; 0 if there is no prefix."""
        self.strength = self._apply_strength_()
        self._check_shared()
        self.device = processes().device

    def twin(self) -> Lesson:
        """The same of other parameters in the same memory, which can be moved and cut without these."""
        twin = copy.copy(self)
        twin.teacher, twin.student = _with_own_parameters(self.teacher), _with_own_parameters(self.student)
        return twin

    def used(self, *, velocities: bool = False) -> tuple[list[nn.Module], list[nn.Module]]:
        """Blocks that run for a batch, and what runs beside them.

        Args:
            velocities: Whether the teacher is asked for them.
        """
        last = self._last(features=self.recipe.losses.features > 0, velocities=velocities)
        blocks = [*self.teacher.blocks[:last], *self.student.blocks[self.num_shared :]]
        names = [(self.student, self.student.head)]
        if last:
            names.append((self.teacher, self.teacher.embedders))
        if velocities:
            names.append((self.teacher, self.teacher.head))
        if not self.num_shared:
            names.append((self.student, self.student.embedders))
        return blocks, [getattr(view.transformer, name) for view, children in names for name in children]

    def _last(self, *, features: bool, velocities: bool) -> int:
        """Blocks of the teacher that are asked."""
        if velocities:
            return len(self.teacher.blocks)
        return self.plan.kept_blocks[-1] + 1 if features else self.num_shared

    def rows(self, states: Feed, part: int) -> torch.Tensor:
        """The states of this process's share of a part of a step, from its number and the seed alone."""
        step, within = divmod(part, self.recipe.accumulate)
        rows = states.rows(self.recipe.seed, step, self.recipe.batch_size)
        here = processes()
        return rows[within * here.number + here.rank :: here.number * self.recipe.accumulate]

    def batch(self, states: Feed, rows: torch.Tensor, part: int = 0) -> Batch:
        """Some states, on the student's device; where they are drawn anew each time, those of the step."""
        draw = (self.recipe.seed, part // self.recipe.accumulate)
        latents, timesteps, text, velocities = states.batch(rows, draw)
        return Batch(
            latents=latents.to(self.device),
            timesteps=timesteps.to(self.device),
            text=text.to(self.device),
            velocities=None if velocities is None else velocities.to(self.device),
        )

    def prefix(self, batch: Batch) -> Streams:
        """What both models' first block behind the prefix is given."""
        streams = self.ask([batch], features=False)[0].streams
        assert streams is not None
        return streams

    @torch.no_grad()
    def ask(
        self,
        batches: list[Batch],
        given: list[Streams] | None = None,
        *,
        features: bool = True,
        awake: Callable[[Iterable[torch.Tensor]], AbstractContextManager[None]] = lambda _: nullcontext(),
        hold_on: torch.device | None = None,
    ) -> list[Answer]:
        """What the teacher says to some batches, all of which pass one block before any passes the next.

        The teacher is asked for no more than counts: its velocities mostly come with the states.

        Args:
            batches: Each is run by itself.
            given: The prefix's streams, if they are known.
            features: Whether they are wanted, if they count.
            awake: Called with the weights that are about to be used.
            hold_on: Where streams lie between blocks, and answers at the end; the device unless given.
        """
        hold = hold_on or self.device
        features = features and self.recipe.losses.features > 0
        wanted = self.plan.kept_blocks[self.num_shared :] if features else ()
        found: list[list[Feature]] = [[] for _ in batches]
        unknown = self.recipe.losses.output > 0 and any(batch.velocities is None for batch in batches)
        last = self._last(features=features, velocities=unknown)
        if last == 0:
            return [Answer(streams=None, features=[]) for _ in batches]
        if given is None:
            begins = [*self.teacher.parameters_of(EMBEDDERS), *self.teacher.transformer.buffers()]
            with awake(begins), self._products():
                streams = [
                    moved(self.teacher.begin(batch.latents, batch.timesteps, batch.text), hold)
                    for batch in batches
                ]
        else:
            streams = given
        shared = streams
        for index in range(0 if given is None else self.num_shared, last):
            block = self.teacher.blocks[index]
            with awake(tensors_of(block)), self._products():
                streams = [moved(self.teacher.apply(block, moved(one, self.device)), hold) for one in streams]
            if index < self.num_shared:
                shared = streams
            if index in wanted:
                for items, one in zip(found, streams, strict=True):
                    items.append((one.image_BND, one.text_BTD))
        ends: list[torch.Tensor | None] = [None for _ in batches]
        if unknown:
            with awake(self.teacher.parameters_of(HEAD)), self._products():
                ends = [self.teacher.end(moved(one, self.device)).to(hold) for one in streams]
        return [
            Answer(streams=one if self.num_shared else None, features=items, velocities=end)
            for one, items, end in zip(shared, found, ends, strict=True)
        ]

    def loss(self, batch: Batch, answer: Answer) -> torch.Tensor:
        """The loss of the student, which goes on from the prefix."""
        weights, pairs = self.recipe.losses, []
        with self._products():
            streams = answer.streams
            if streams is None:
                streams = self.student.begin(batch.latents, batch.timesteps, batch.text)
            for index, block in enumerate(self.student.blocks[self.num_shared :]):
                streams = self._apply(block, streams)
                if answer.features:
                    image, text = answer.features[index]
                    pairs.append((streams.image_BND, image))
                    if streams.text_BTD is not None and text is not None:
                        pairs.append((streams.text_BTD, text))
            total = torch.zeros((), device=self.device)
            if weights.output:
                target = answer.velocities if batch.velocities is None else batch.velocities
                assert target is not None
                total = total + weights.output * output_loss(self.student.end(streams), target)
        if weights.features:
            total = total + weights.features * feature_loss(pairs, normalised=weights.normalised)
        return total

    def _apply(self, block: nn.Module, streams: Streams) -> Streams:
        if not self.recipe.checkpointing:
            return self.student.apply(block, streams)
        # Blocks draw no random numbers, so there is no state of a generator to put back.
        result: Streams = recomputed(
            self.student.apply, block, streams, use_reentrant=False, preserve_rng_state=False
        )
        return result

    def _products(self) -> AbstractContextManager[Any]:
        if self.recipe.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _apply_strength_(self) -> dict[str, float]:
        plan, student = self.plan, self.student
        shares: dict[nn.Parameter, float] = {}
        for unit in (EMBEDDERS, HEAD):
            shares |= dict.fromkeys(student.parameters_of(unit), plan.strength_of(unit))
        sizeless = student.geometry(height=1, width=1, text_tokens=1)
        for index, (old, block) in enumerate(zip(plan.kept_blocks, sizeless.blocks, strict=True)):
            values = {name: plan.strength_of(f"{old}.{name}") for name in block.components}
            # What a removed norm leaves, a constant, learns like the strongest of its block.
            shares |= dict.fromkeys(student.parameters_of(str(index)), max(values.values()))
            for name, value in values.items():
                shares |= dict.fromkeys(student.parameters_of(f"{index}.{name}"), value)
        named = dict(student.transformer.named_parameters())
        for item in named.values():
            item.requires_grad_(shares[item] > 0)
            if item.requires_grad:
                item.data = item.data.float()
        if not any(shares.values()):
            raise ToolchainError("the plan freezes everything, so there is nothing to distil")
        return {name: shares[item] for name, item in named.items()}

    def _check_shared(self) -> None:
        for name in self._prefix_units():
            ours, theirs = (
                list(map(storage_key, model.parameters_of(name))) for model in (self.student, self.teacher)
            )
            if ours != theirs:
                part = name if name == EMBEDDERS else f"block {name}"
                raise ToolchainError(
                    f"the plan freezes the student's {part}, but it is not the teacher's own; "
                    "make the student with prune(teacher, plan, share_prefix=True)"
                )
        theirs_all = set(map(storage_key, self.teacher.transformer.parameters()))
        for name, item in self.student.transformer.named_parameters():
            if item.requires_grad and storage_key(item) in theirs_all:
                raise ToolchainError(
                    f"the plan lets the student's {name} learn, but it is the teacher's own; "
                    "make the student with prune(teacher, plan, share_prefix=True)"
                )

    def teachers_own(self, *, prefix_only: bool) -> list[torch.Tensor]:
        """Weights that only the teacher needs, or only the prefix, in both models where they are shared."""
        theirs, ours = tensors_of(self.teacher.transformer), tensors_of(self.student.transformer)
        prefix = {storage_key(item) for item in self.prefix_tensors()}
        keys = set(map(storage_key, theirs)) - (set(map(storage_key, ours)) - prefix)
        if prefix_only:
            keys &= prefix
        return [item for item in dict.fromkeys([*theirs, *ours]) if storage_key(item) in keys]

    def prefix_tensors(self) -> list[torch.Tensor]:
        """Weights and buffers of the prefix, in their order."""
        units = self._prefix_units()
        weights = [item for unit in units for item in self.teacher.parameters_of(unit)]
        return [*weights, *self.teacher.transformer.buffers()] if units else []

    def _prefix_units(self) -> list[str]:
        return [EMBEDDERS, *map(str, range(self.num_shared))] if self.num_shared else []


def _with_own_parameters(view: MMDiT) -> MMDiT:
    own: dict[int, Any] = {
        id(item): nn.Parameter(item.detach(), requires_grad=item.requires_grad)
        for item in view.transformer.parameters()
    }
    own |= {id(item): item.detach() for item in view.transformer.buffers()}
    transformer = copy.deepcopy(view.transformer, own)
    return type(view)(transformer, guidance_scale=view.guidance_scale, vae_scale_factor=view.vae_scale_factor)


def check_shares(recipe: DistillRecipe, size: int, *, rests: bool) -> None:
    """Refuse what several processes, or parts of a batch, cannot do.

    Args:
        recipe: What is learned, and how.
        size: Of a batch.
        rests: Whether weights leave memory meanwhile.

    Raises:
        ToolchainError: There is such a thing.
    """
    here = processes()
    if rests and here.sharded:
        raise ToolchainError(
            "weights that are sharded (FSDP) do not rest: leave cache_prefix and in_turn out"
        )
    shares = here.number * recipe.accumulate
    if size % shares:
        raise ToolchainError(
            f"a batch of {size} states does not fall into {shares} equal shares ({here.number} processes, "
            f"each in {recipe.accumulate} parts); choose a batch size that is a multiple of {shares}"
        )
    if shares > 1 and recipe.losses.features and recipe.losses.normalised:
        raise ToolchainError(
            "normalised features are divided by their size in the batch, which a share of it does not show; "
            "leave normalised out, or train in one process and one part"
        )


def _from_cache(
    lesson: Lesson,
    states: Feed,
    path: Path,
    dtype: torch.dtype | None,
    own: list[torch.Tensor],
    stack: ExitStack,
) -> Callable[[int, Batch], Answer]:
    if not lesson.num_shared:
        raise ToolchainError(
            "the plan changes the first block, or lets it or the embedders learn: there is no prefix whose "
            "outputs could be kept; leave cache_prefix out"
        )
    if not states.fixed:
        raise ToolchainError(
            "noise is drawn anew for every picture at every step, so the prefix's outputs are never the same "
            "twice; leave cache_prefix out, or train on states of the teacher's sampling"
        )
    made_from = {
        "blocks": str(lesson.num_shared),
        "weights": digest(lesson.prefix_tensors()),
        "states": states.digest(),
        "precision": lesson.recipe.precision,
    }
    resting = Resting(own, path.absolute().parent, lesson.device)
    stack.callback(resting.go_home)

    def make() -> None:
        if path.exists():
            return
        with resting.awake(lesson.prefix_tensors()):
            write_stream_cache(
                path,
                lambda rows: lesson.prefix(lesson.batch(states, rows)),
                len(states),
                batch_size=lesson.recipe.batch_size,
                dtype=dtype or getattr(torch, lesson.recipe.precision),
                made_from=made_from,
            )

    processes().first(make)
    cache = read_stream_cache(path, made_from)

    def answer(part: int, batch: Batch) -> Answer:
        return lesson.ask([batch], [cache.streams(lesson.rows(states, part), lesson.device)])[0]

    return answer


def _in_turn(
    lesson: Lesson, states: Feed, turn: InTurn, own: list[torch.Tensor], stack: ExitStack
) -> Callable[[int, Batch], Answer]:
    resting = Resting(own, turn.directory, lesson.device)
    stack.callback(resting.go_home)
    answers: dict[int, Answer] = {}
    each, last = lesson.recipe.accumulate, lesson.recipe.accumulate * lesson.recipe.schedule.steps

    def answer(part: int, batch: Batch) -> Answer:
        if part not in answers:
            parts = range(part, min(part + each * turn.steps, last))
            batches = [lesson.batch(states, lesson.rows(states, later), later) for later in parts]
            asked = lesson.ask(batches, awake=resting.awake, hold_on=torch.device("cpu"))
            answers.update(zip(parts, asked, strict=True))
        return _moved(answers.pop(part), lesson.device)

    return answer


def _moved(answer: Answer, device: torch.device) -> Answer:
    return Answer(
        streams=None if answer.streams is None else moved(answer.streams, device),
        features=[
            (image.to(device), None if text is None else text.to(device)) for image, text in answer.features
        ],
        velocities=None if answer.velocities is None else answer.velocities.to(device),
    )


def _belongs_to(plan: CompressionPlan, states: Feed, recipe: DistillRecipe) -> dict[str, Any]:
    """What a run depends on besides its schedule, by names a message can use."""
    return {
        "removed": list(map(str, plan.removed)),
        "semantics": plan.semantics,
        "strength": plan.strength,
        "states": states.digest(),
        "batch_size": recipe.batch_size,
        "seed": recipe.seed,
        "losses": asdict(recipe.losses),
        "precision": recipe.precision,
    }
