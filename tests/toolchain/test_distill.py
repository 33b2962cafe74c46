"""Distillation shares what is one, teaches as the plan says, and comes out the same however it is run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

from toolchain.checkpoints import Checkpoints
from toolchain.distill import DistillRecipe, InTurn, Lesson, distill_
from toolchain.errors import ToolchainError
from toolchain.families.mmdit import Streams
from toolchain.families.view import Model
from toolchain.geometry import Unit
from toolchain.losses import LossWeights
from toolchain.optimize import Schedule
from toolchain.plan import CompressionPlan
from toolchain.prefix import read_stream_cache, write_stream_cache
from toolchain.prune import prune
from toolchain.trajectories import States

SCHEDULE = Schedule(steps=6, learning_rate=1e-3, warmup_steps=2, checkpoint_every=2)
RECIPE = DistillRecipe(
    schedule=SCHEDULE,
    batch_size=3,
    seed=7,
    losses=LossWeights(output=1.0, features=0.1),
    precision="float32",
)
OUTPUT_ONLY = replace(RECIPE, losses=LossWeights(features=0.0))
PWP = {"embedders": 0.0, "0": 0.0, "1": 0.0, "2": 0.0, "4": 1.0, "5": 1.0, "head": 1.0}
LATER = {"embedders": 0.0, "0": 0.0, "1": 0.0, "2": 0.0, "3": 0.0, "4": 1.0, "head": 1.0}


def plan_of(model: Model, *removed: str, strength: dict[str, float] = PWP) -> CompressionPlan:
    return CompressionPlan(
        model="tiny",
        geometry=model.geometry,
        semantics="zero",
        rule="manual",
        removed=tuple(map(Unit.parse, removed)),
        strength=strength,
        asked={},
    )


@pytest.fixture
def plan(tiny: Model) -> CompressionPlan:
    """Of six blocks 3 goes, so the embedders and 0 to 2 are shared, and 4, 5 and the head learn."""
    return plan_of(tiny, "3")


Taught = dict[str, torch.Tensor]


@pytest.fixture
def teach(tiny: Model, plan: CompressionPlan, states: States) -> Callable[..., Taught]:
    """Distil a new student; its weights."""

    def run(recipe: DistillRecipe = RECIPE, plan: CompressionPlan = plan, **options: Any) -> Taught:
        student = prune(tiny, plan, share_prefix=True)
        distill_(tiny, student, plan, options.pop("states", states), recipe, **options)
        return weights_of(student)

    return run


def weights_of(model: Model) -> Taught:
    return {name: item.clone() for name, item in model.pipeline.transformer.state_dict().items()}


def same(first: Taught, second: Taught) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def calls(tiny: Model) -> Iterator[list[int]]:
    """The teacher's blocks as they are called, the shared ones for both models."""
    told: list[int] = []

    own = tiny.mmdit.blocks

    def note(block: nn.Module, _: Any) -> None:
        if block in own:  # and not a copy, hooks included
            told.append(own.index(block))

    hooks = [block.register_forward_pre_hook(note) for block in own]
    yield told
    for hook in hooks:
        hook.remove()


def whole_loss(
    teacher: Model, student: Model, counterparts: dict[int, int], states: States, losses: LossWeights
) -> torch.Tensor:
    """The same loss of two models that share nothing, each run as diffusers runs it."""

    def run(model: Model) -> tuple[torch.Tensor, list[Any]]:
        transformer, found = model.pipeline.transformer, []
        hooks = [
            block.register_forward_hook(lambda *seen: found.append(seen[-1]))
            for block in transformer.transformer_blocks
        ]
        velocity = transformer(
            hidden_states=latents,
            timestep=timesteps,
            encoder_hidden_states=text.tokens_BTJ,
            pooled_projections=text.pooled_BP,
        ).sample
        for hook in hooks:
            hook.remove()
        return velocity, found

    latents, timesteps, text, _ = states.batch(slice(3))
    (wanted, theirs), (predicted, ours) = run(teacher), run(student)
    loss = losses.output * F.mse_loss(predicted, wanted)
    for mine, other in counterparts.items():
        for stream, expected in zip(ours[mine], theirs[other], strict=True):
            if stream is not None and expected is not None:
                size = expected.square().mean() if losses.normalised else 1.0
                loss = loss + losses.features * F.mse_loss(stream, expected) / size
    return loss


@pytest.mark.parametrize(
    "losses",
    [
        LossWeights(features=0.0),
        LossWeights(features=0.1),
        LossWeights(output=0.0, features=1.0, normalised=True),
    ],
)
@pytest.mark.parametrize(
    ("removed", "strength", "counterparts"),
    [
        (("3",), PWP, {3: 4, 4: 5}),
        (("3.ff", "5"), PWP | {"3": 1.0} | {"5": None}, {3: 3, 4: 4}),
        (("3",), dict.fromkeys([*PWP], 1.0), {0: 0, 1: 1, 2: 2, 3: 4, 4: 5}),
        (("0",), dict.fromkeys([*"12345", "head"], 1.0) | {"embedders": 0.0}, {k: k + 1 for k in range(5)}),
    ],
    ids=["whole-block", "component-and-last-block", "everything-learns", "first-block"],
)
def test_loss_and_gradients_are_those_of_two_whole_models(
    tiny: Model,
    states: States,
    removed: tuple[str, ...],
    strength: dict[str, Any],
    counterparts: dict[int, int],
    losses: LossWeights,
) -> None:
    plan = plan_of(tiny, *removed, strength={k: v for k, v in strength.items() if v is not None})
    student = prune(tiny, plan, share_prefix=True)
    lesson = Lesson(tiny.mmdit, student.mmdit, plan, replace(RECIPE, losses=losses))
    whole_teacher, whole_student = copy.deepcopy((tiny, prune(tiny, plan)))
    learning = {name for name, item in student.pipeline.transformer.named_parameters() if item.requires_grad}
    for name, item in whole_student.pipeline.transformer.named_parameters():
        item.requires_grad_(name in learning)

    batch = lesson.batch(states, torch.arange(3))
    loss = lesson.loss(batch, lesson.ask([batch])[0])
    loss.backward()
    expected = whole_loss(whole_teacher, whole_student, counterparts, states, losses)
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-8)
    theirs = dict(whole_student.pipeline.transformer.named_parameters())
    assert learning
    for name, item in student.pipeline.transformer.named_parameters():
        size = 0.0 if theirs[name].grad is None else float(theirs[name].grad.abs().max())
        if size:
            torch.testing.assert_close(item.grad, theirs[name].grad, rtol=1e-4, atol=1e-5 * size + 1e-9)
        else:
            # What cannot change the loss was not computed: the text behind its last use.
            assert item.grad is None or not item.grad.any(), name


def test_the_frozen_prefix_is_one_storage_and_the_rest_is_the_students_own(
    tiny: Model, plan: CompressionPlan
) -> None:
    student = prune(tiny, plan, share_prefix=True)
    Lesson(tiny.mmdit, student.mmdit, plan, RECIPE)
    theirs = {item.data_ptr() for item in tiny.pipeline.transformer.parameters()}
    for unit, shared in {"embedders": True, "0": True, "2": True, "3": False, "head": False}.items():
        parameters = student.mmdit.parameters_of(unit)
        assert {item.data_ptr() in theirs for item in parameters} == {shared}, unit
        assert {item.requires_grad for item in parameters} == {not shared}, unit


def test_a_student_learns_and_its_teacher_stays(tiny: Model, plan: CompressionPlan, states: States) -> None:
    before, losses = weights_of(tiny), dict[int, float]()
    student = prune(tiny, plan, share_prefix=True)
    untaught = weights_of(student)
    recipe = replace(RECIPE, batch_size=8, schedule=replace(SCHEDULE, steps=30))
    distill_(tiny, student, plan, states, recipe, on_step=losses.__setitem__)
    assert losses[29] < 0.7 * losses[0]
    assert same(weights_of(tiny), before)
    moved = {name for name, item in weights_of(student).items() if not torch.equal(item, untaught[name])}
    learning = {name for name, item in student.pipeline.transformer.named_parameters() if item.requires_grad}
    assert moved == learning


def test_the_prefix_runs_once_and_the_teacher_no_further_than_is_asked(
    teach: Callable[..., Taught], calls: list[int]
) -> None:
    one = replace(SCHEDULE, steps=1)
    teach(replace(OUTPUT_ONLY, schedule=one))
    assert calls == [0, 1, 2]
    calls.clear()
    teach(replace(RECIPE, schedule=one))
    assert calls == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_strength_scales_how_far_weights_move(tiny: Model, states: States, share: float) -> None:
    plan = plan_of(tiny, "3", strength={**PWP, "4.ff": share, "5.attn": 0.0})
    student = prune(tiny, plan, share_prefix=True)
    start = weights_of(student)
    one = Schedule(steps=1, learning_rate=1e-3, warmup_steps=0, cooldown=0.0, weight_decay=0.0)
    distill_(tiny, student, plan, states, replace(RECIPE, schedule=one))

    def moved(unit: str) -> float:
        names = {id(item): name for name, item in student.pipeline.transformer.named_parameters()}
        items = student.mmdit.parameters_of(unit)
        return max(float((item - start[names[id(item)]]).abs().max().detach()) for item in items)

    # The first step of Adam moves a weight by its rate.
    assert moved("3.ff") == pytest.approx(share * 1e-3, rel=1e-2)
    assert moved("3.attn") == pytest.approx(1e-3, rel=1e-2)
    assert moved("4.attn") == 0.0
    assert moved("4.ff") == pytest.approx(1e-3, rel=1e-2)
    assert moved("head") == pytest.approx(1e-3, rel=1e-2)


def test_what_a_removed_norm_leaves_learns_with_its_block(tiny: Model) -> None:
    plan = plan_of(tiny, "3.norm1", strength={**PWP, "3": 0.0, "3.ff": 0.5})
    student = prune(tiny, plan, share_prefix=True)
    lesson = Lesson(tiny.mmdit, student.mmdit, plan, RECIPE)
    assert lesson.strength["transformer_blocks.3.norm1.linear.bias"] == 0.5


def test_frozen_weights_have_no_optimiser_state(teach: Callable[..., Taught], tmp_path: Path) -> None:
    teach(checkpoints=Checkpoints(directory=tmp_path / "state"))
    with Checkpoints(directory=tmp_path / "state").latest() as stored:
        assert stored is not None
        names = {key.partition("/")[2] for key in stored.names}
    assert {name.split(".")[1] for name in names if name.startswith("transformer_blocks")} == {"3", "4"}
    assert not any(name.startswith(("pos_embed", "time_text", "context_embedder")) for name in names)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_recomputing_activations_changes_nothing(teach: Callable[..., Taught], precision: Any) -> None:
    recipe = replace(RECIPE, precision=precision)
    assert same(teach(recipe), teach(replace(recipe, checkpointing=True)))


def test_the_seed_decides_what_is_learned(teach: Callable[..., Taught]) -> None:
    assert same(teach(), teach())
    assert not same(teach(), teach(replace(RECIPE, seed=8)))


@pytest.mark.parametrize(
    ("recipe", "turn"), [(RECIPE, 1), (OUTPUT_ONLY, 4), (replace(RECIPE, precision="bfloat16"), 100)]
)
def test_taking_turns_changes_nothing(
    teach: Callable[..., Taught], recipe: DistillRecipe, turn: int, tmp_path: Path
) -> None:
    assert same(teach(recipe, in_turn=InTurn(steps=turn, directory=tmp_path)), teach(recipe))
    assert not list(tmp_path.iterdir())


def test_the_teacher_answers_for_a_turn_and_is_out_of_memory_in_the_rest_of_it(
    tiny: Model, plan: CompressionPlan, teach: Callable[..., Taught], calls: list[int], tmp_path: Path
) -> None:
    called: list[int] = []
    resting: list[bool] = []
    before, places = weights_of(tiny), [item.data_ptr() for item in tiny.pipeline.transformer.parameters()]

    def on_step(step: int, loss: float) -> None:
        called.append(len(calls))
        now = [item.data_ptr() for item in tiny.pipeline.transformer.parameters()]
        resting.append(not set(now) & set(places))

    teach(in_turn=InTurn(steps=4, directory=tmp_path), on_step=on_step)
    assert called == [4 * 6] * 4 + [6 * 6] * 2
    # Block after block, each for all steps of the turn.
    assert calls == [index for steps in (4, 2) for index in range(6) for _ in range(steps)]
    assert all(resting)
    assert same(weights_of(tiny), before)
    assert not any(item.requires_grad for item in tiny.pipeline.transformer.parameters())


@pytest.mark.parametrize("options", ["in_turn", "cache_prefix"])
def test_prefix_and_teacher_are_one_again_after_resting(
    tiny: Model, plan: CompressionPlan, states: States, options: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {
        "in_turn": {"in_turn": InTurn(steps=2, directory=tmp_path)},
        "cache_prefix": {"cache_prefix": tmp_path / "streams.safetensors"},
    }
    student = prune(tiny, plan, share_prefix=True)

    def stop(step: int, loss: float) -> None:
        raise KeyboardInterrupt

    for on_step in (None, stop):
        try:
            distill_(tiny, student, plan, states, RECIPE, on_step=on_step, **given[options])
        except KeyboardInterrupt:
            assert on_step is stop
        for unit in ("embedders", "1"):
            for ours, theirs in zip(
                student.mmdit.parameters_of(unit), tiny.mmdit.parameters_of(unit), strict=True
            ):
                assert ours.data_ptr() == theirs.data_ptr()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_kept_outputs_of_the_prefix_teach_the_same(
    teach: Callable[..., Taught], precision: Any, tmp_path: Path
) -> None:
    recipe = replace(RECIPE, precision=precision)
    # Batches of the same size and different rows: only the order of sums in a matrix product can differ.
    tolerance = {"float32": 1e-5, "bfloat16": 1e-3}[precision]
    kept, direct = teach(recipe, cache_prefix=tmp_path / "streams.safetensors"), teach(recipe)
    for name, item in direct.items():
        torch.testing.assert_close(kept[name], item, rtol=0, atol=tolerance)


def test_kept_outputs_are_computed_once_and_read_ever_after(
    teach: Callable[..., Taught], states: States, calls: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "streams.safetensors"
    first = teach(OUTPUT_ONLY, cache_prefix=path)
    batches = -(-len(states) // 3)
    assert calls == [0, 1, 2] * batches
    assert same(teach(replace(OUTPUT_ONLY), cache_prefix=path), first)
    assert calls == [0, 1, 2] * batches
    assert [item.name for item in tmp_path.iterdir()] == ["streams.safetensors"]


def test_outputs_can_be_kept_in_16_bits(teach: Callable[..., Taught], states: States, tmp_path: Path) -> None:
    sizes = {}
    for dtype in (torch.float32, torch.bfloat16):
        path = tmp_path / f"{dtype}.safetensors"
        teach(cache_prefix=path, cache_dtype=dtype)
        with safe_open(path, framework="pt") as stored:
            sizes[dtype] = {key: stored.get_tensor(key).nbytes for key in stored.keys()}  # noqa: SIM118
    assert set(sizes[torch.float32]) == {"image_BND", "text_BTD", "conditioning_BD"}
    assert sizes[torch.bfloat16] == {key: size // 2 for key, size in sizes[torch.float32].items()}


def test_a_cache_of_something_else_is_refused(
    tiny: Model, teach: Callable[..., Taught], states: States, tmp_path: Path
) -> None:
    path = tmp_path / "streams.safetensors"
    teach(cache_prefix=path)
    with pytest.raises(ToolchainError, match="with other precision than"):
        teach(replace(RECIPE, precision="bfloat16"), cache_prefix=path)
    with pytest.raises(ToolchainError, match="with other states than"):
        teach(states=replace(states, timesteps=states.timesteps + 1), cache_prefix=path)
    with pytest.raises(ToolchainError, match="with other blocks, weights than"):
        teach(plan=plan_of(tiny, "5", strength=LATER), cache_prefix=path)
    with torch.no_grad():
        tiny.mmdit.parameters_of("1.ff")[0][0] += 1
    with pytest.raises(ToolchainError, match="with other weights than"):
        teach(cache_prefix=path)
    path.write_bytes(b"nothing")
    with pytest.raises(ToolchainError, match="holds no outputs of a prefix"):
        teach(cache_prefix=path)


def test_a_cache_that_could_not_be_finished_is_not_there(tmp_path: Path) -> None:
    def compute(rows: torch.Tensor) -> Streams:
        if 2 in rows:
            raise KeyboardInterrupt
        return streams_of(rows)

    with pytest.raises(KeyboardInterrupt):
        write_stream_cache(tmp_path / "streams", compute, 5, batch_size=2, dtype=torch.float32, made_from={})
    assert not list(tmp_path.iterdir())


def streams_of(rows: torch.Tensor) -> Streams:
    """As FLUX has them, with rotary angles for all states."""
    image = rows[:, None, None] * torch.ones(1, 2, 3)
    return Streams(
        image_BND=image.bfloat16(),
        text_BTD=-image[:, :1],
        conditioning_BD=rows[:, None] / 8,
        rotary=(torch.arange(3.0), torch.tensor([0.1])),
        size=(4, 6),
    )


def test_kept_streams_come_back_as_they_were(tmp_path: Path) -> None:
    path, all_rows = tmp_path / "streams", torch.arange(5)
    write_stream_cache(path, streams_of, 5, batch_size=2, dtype=torch.bfloat16, made_from={"seed": "1"})
    cache = read_stream_cache(path, {"seed": "1"})
    for rows in (all_rows, torch.tensor([4, 1])):
        back, expected = cache.streams(rows, torch.device("cpu")), streams_of(rows)
        assert back.size == (4, 6)
        for name in ("image_BND", "text_BTD", "conditioning_BD"):
            assert getattr(back, name).dtype == getattr(expected, name).dtype
            assert torch.equal(getattr(back, name), getattr(expected, name))
        assert back.rotary is not None
        assert expected.rotary is not None
        assert all(map(torch.equal, back.rotary, expected.rotary))


@pytest.mark.parametrize(
    ("mode", "stop_after"),
    [("plain", 0), ("plain", 3), ("plain", 5), ("in_turn", 2), ("in_turn", 3), ("cache_prefix", 3)],
)
def test_a_run_that_was_stopped_ends_as_an_undisturbed_one(
    teach: Callable[..., Taught], mode: str, stop_after: int, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "plain": {},
        "in_turn": {"in_turn": InTurn(steps=4, directory=tmp_path)},
        "cache_prefix": {"cache_prefix": tmp_path / "streams"},
    }[mode]

    def stop(step: int, loss: float) -> None:
        if step == stop_after:
            raise KeyboardInterrupt

    state = Checkpoints(directory=tmp_path / "state")
    with pytest.raises(KeyboardInterrupt):
        teach(checkpoints=state, on_step=stop, **options)
    assert same(teach(checkpoints=state, **options), teach(**options))


def test_nonsense_ends_a_run_and_leaves_its_last_checkpoint(
    teach: Callable[..., Taught], states: States, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = Checkpoints(directory=tmp_path / "state")
    rows = Lesson.rows

    def damaged(self: Lesson, all_states: States, step: int) -> torch.Tensor:
        if step == 3:
            all_states.velocities[:] = float("nan")
        return rows(self, all_states, step)

    monkeypatch.setattr(Lesson, "rows", damaged)
    with pytest.raises(ToolchainError, match="the loss became nan at step 3"):
        teach(states=replace(states, velocities=states.velocities.clone()), checkpoints=state)
    with state.latest() as stored:
        assert stored is not None
        assert stored.step == 2
        assert all(stored.get(name).isfinite().all() for name in stored.names)


def test_a_checkpoint_of_another_training_is_refused(
    tiny: Model, teach: Callable[..., Taught], states: States, tmp_path: Path
) -> None:
    state = Checkpoints(directory=tmp_path / "state")
    teach(checkpoints=state)
    for options, named in [
        ({"recipe": replace(RECIPE, seed=8)}, "seed was 7 and is 8"),
        ({"recipe": replace(RECIPE, batch_size=2)}, "batch_size was 3 and is 2"),
        ({"recipe": OUTPUT_ONLY}, "losses was another"),
        ({"recipe": replace(RECIPE, schedule=replace(SCHEDULE, learning_rate=1.0))}, "learning_rate was"),
        ({"plan": plan_of(tiny, "3", strength=PWP | {"5": 0.5})}, "strength was another"),
        ({"plan": plan_of(tiny, "5", strength=LATER)}, r"removed was \[\"3\"\] and is \[\"5\"\]"),
        ({"states": replace(states, latents=states.latents + 1)}, "states was another"),
    ]:
        with pytest.raises(ToolchainError, match=f"belongs to another training: .*{named}"):
            teach(checkpoints=state, **options)


def test_a_student_that_is_not_of_this_plan_is_refused(
    tiny: Model, plan: CompressionPlan, states: States
) -> None:
    with pytest.raises(ToolchainError, match="embedders, but it is not the teacher's own"):
        distill_(tiny, prune(tiny, plan), plan, states, RECIPE)
    with pytest.raises(ToolchainError, match="the student has 6 blocks, but the plan leaves 5"):
        distill_(tiny, tiny, plan, states, RECIPE)
    view = replace(tiny, pipeline=copy.copy(tiny.pipeline))
    view.pipeline.transformer = tiny.mmdit.without(plan.removed, "zero").transformer
    with pytest.raises(ToolchainError, match=r"lets the student's .* learn, but it is the teacher's own"):
        distill_(tiny, view, plan, states, RECIPE)


def test_a_plan_that_freezes_everything_is_refused(tiny: Model, states: States) -> None:
    plan = plan_of(tiny, "3", strength=dict.fromkeys(PWP, 0.0))
    with pytest.raises(ToolchainError, match="freezes everything"):
        distill_(tiny, prune(tiny, plan, share_prefix=True), plan, states, RECIPE)


def test_without_a_frozen_prefix_there_is_nothing_to_keep(
    tiny: Model, states: States, tmp_path: Path
) -> None:
    plan = plan_of(tiny, "3", strength=dict.fromkeys(PWP, 1.0))
    student = prune(tiny, plan, share_prefix=True)
    with pytest.raises(ToolchainError, match="no prefix whose outputs could be kept"):
        distill_(tiny, student, plan, states, RECIPE, cache_prefix=tmp_path / "streams")
    before = weights_of(student)
    distill_(tiny, student, plan, states, RECIPE, in_turn=InTurn(steps=2, directory=tmp_path))
    assert not same(weights_of(student), before)


def test_outputs_are_kept_or_taken_in_turn_not_both(teach: Callable[..., Taught], tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="either kept for all states"):
        teach(cache_prefix=tmp_path / "streams", in_turn=InTurn(steps=1, directory=tmp_path))
    with pytest.raises(ToolchainError, match="a turn is 0 steps long"):
        teach(in_turn=InTurn(steps=0, directory=tmp_path))


def test_a_16_bit_teacher_teaches_a_student_that_learns_in_32(
    tiny: Model, plan: CompressionPlan, states: States
) -> None:
    tiny.pipeline.transformer.to(torch.bfloat16)
    student = prune(tiny, plan, share_prefix=True)
    distill_(tiny, student, plan, states, replace(RECIPE, precision="bfloat16"))
    dtypes = {item.requires_grad: item.dtype for item in student.pipeline.transformer.parameters()}
    assert dtypes == {False: torch.bfloat16, True: torch.float32}


def test_weights_come_home_from_another_device_and_are_one_again(
    tiny: Model,
    plan: CompressionPlan,
    states: States,
    teach: Callable[..., Taught],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = teach()
    # Torch takes it for another device than the one weights are on, and copies them there.
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu:0")
    student, places = prune(tiny, plan, share_prefix=True), []
    before = [
        item.data_ptr() for model in (tiny, student) for item in model.pipeline.transformer.parameters()
    ]

    def on_step(step: int, loss: float) -> None:
        items = [item for model in (tiny, student) for item in model.pipeline.transformer.parameters()]
        places.append({item.data_ptr() for item in items})

    distill_(tiny, student, plan, states, RECIPE, on_step=on_step)
    assert not places[0] & set(before)
    assert len(places[0]) == len(set(before))
    assert same(weights_of(student), here)
    learned = {item.data_ptr() for item in student.pipeline.transformer.parameters() if item.requires_grad}
    after = [item.data_ptr() for model in (tiny, student) for item in model.pipeline.transformer.parameters()]
    assert learned
    assert [a for a in after if a not in learned] == [
        b for b, a in zip(before, after, strict=True) if a not in learned
    ]
