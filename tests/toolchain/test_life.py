"""The life of a compression: looked at, stopped, gone on with, stepped back, and told to others."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from toolchain import cli, compress, distill
from toolchain.artifacts import read_json
from toolchain.compress import Decision, Outcome, Recipe, compress_model
from toolchain.errors import ToolchainError
from toolchain.families import Model, open_model
from toolchain.gate import Gate
from toolchain.geometry import Unit
from toolchain.history import history_from_json
from toolchain.plan import CompressionPlan
from toolchain.processes import Processes
from toolchain.progress import silent
from toolchain.rules import Budget, Options
from toolchain.zero import Zero

RECIPE = Recipe(
    decision=Decision(rule="random", budget=Budget(ratio=0.4), options=Options(seed=1), prompts=2),
    steps=4,
    batch_size=4,
    warmup=0.0,
    captions_per_task=0,
    checkpoint_every=100,
    pictures=2,
)
NEVER, AT_ONCE = Gate(metric="velocity", bound=0.0), Gate(metric="velocity", bound=100.0)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(tiny_path: Path) -> Callable[..., Outcome]:
    def run(output: str, recipe: Recipe = RECIPE, **options: Any) -> Outcome:
        return compress_model(open_model(str(tiny_path)), recipe, Path(output), bar=silent, **options)

    return run


def same(first: str, second: str) -> bool:
    """Whether two students, and all that is said of how they came about, are the same."""
    told = [read_json(Path(name) / "report.json") for name in (first, second)]
    for report in told:
        del report["student"]
    files = [
        {path.relative_to(name): path.read_bytes() for path in Path(name).rglob("*") if path.is_file()}
        for name in (first, second)
    ]
    for found in files:
        del found[Path("report.json")]
    return told[0] == told[1] and files[0] == files[1]


def interrupted(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Have a training get SIGTERM in the middle of a step."""
    rows = distill.Lesson.rows

    def rows_and_signal(self: Any, states: Any, index: int) -> torch.Tensor:
        if index == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return rows(self, states, index)

    monkeypatch.setattr(distill.Lesson, "rows", rows_and_signal)


def test_sigterm_saves_the_run_and_the_same_command_goes_on(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hptool(output: str) -> int:
        few = ("--steps", "4", "--per-task", "0", "--remove", "2", "--num-prompts", "2", "--ema", "0.9")
        looks = ("--check-every", "2", "--tracker", "tensorboard")
        monkeypatch.setattr(
            sys, "argv", ["hptool", "compress", str(tiny_path), *few, *looks, "--output", output]
        )
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    with monkeypatch.context() as changed:
        interrupted(changed, 2)
        assert hptool("halved") == 75
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == "stopped by SIGTERM; what was finished is kept, and the same command goes on"
    assert not Path("halved").exists()
    checkpoints = Path("halved.work/try-1/checkpoints")
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "step-00000002.safetensors",  # the best
        "step-00000003.safetensors",  # the last
    ]
    assert hptool("halved") == hptool("whole") == 0
    assert same("halved", "whole")
    assert not Path("halved.work").exists()
    assert len(list(Path("halved.logs").rglob("events.*"))) == 2


def test_a_look_leaves_numbers_and_pictures_of_the_same_prompts(run: Callable[..., Outcome]) -> None:
    run("student", replace(RECIPE, check_every=2))
    history = history_from_json(read_json(Path("student/history.json")))
    assert len(history.losses) == len(history.rates) == 4
    assert [check.step for check in history.checks] == [2, 4]
    pictures = sorted(Path("student/pictures").iterdir())
    assert [path.name for path in pictures] == ["original.png", "step-00000002.png", "step-00000004.png"]
    assert {Image.open(path).size for path in pictures} == {(128, 64)}
    stage = read_json(Path("student/report.json"))["stages"][-1]
    assert history.checks[-1].velocity_error == stage["velocity_error"]


def test_looking_changes_nothing(run: Callable[..., Outcome]) -> None:
    for name, every in (("looked-at", 1), ("alone", None)):
        run(name, replace(RECIPE, check_every=every, ema_decay=0.5))
    found = [history_from_json(read_json(Path(name) / "history.json")) for name in ("looked-at", "alone")]
    assert found[0].losses == found[1].losses


def test_a_student_that_passes_its_gate_is_taught_no_longer(run: Callable[..., Outcome]) -> None:
    outcome = run("student", replace(RECIPE, check_every=1, gate=AT_ONCE))
    assert [(tried.steps, tried.passed) for tried in outcome.tries] == [(1, True)]
    assert len(history_from_json(read_json(Path("student/history.json"))).losses) == 1


def test_a_plan_steps_back_until_a_student_passes(run: Callable[..., Outcome]) -> None:
    said: list[str] = []
    outcome = run("student", replace(RECIPE, gate=NEVER, step_back=0.5), say=said.append)
    ratios = [tried.ratio_reached for tried in outcome.tries]
    assert [ratio >= least for ratio, least in zip(ratios, (0.4, 0.2, 0.1), strict=True)] == [True] * 3
    assert ratios == sorted(ratios, reverse=True)
    assert [tried.passed for tried in outcome.tries] == [False] * 3
    assert (outcome.removed, outcome.ratio_reached) == (outcome.tries[-1].removed, ratios[-1])
    assert open_model("student").num_parameters == outcome.stages[-1].num_parameters
    assert len(said) == 2
    assert said[0].startswith("the gate velocity<=0 was not passed (")
    report = read_json(Path("student/report.json"))
    assert [tried["removed"] for tried in report["tries"]] == [tried.removed for tried in outcome.tries]


def test_tries_that_failed_are_not_made_again(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, gate=NEVER, step_back=0.5, tries=2)
    prune = compress.prune
    pruned: list[CompressionPlan] = []

    def stop_at_the_second(teacher: Model, plan: CompressionPlan, **options: Any) -> Model:
        pruned.append(plan)
        if len(pruned) == 2:
            raise KeyboardInterrupt
        return prune(teacher, plan, **options)

    with monkeypatch.context() as changed:
        changed.setattr(compress, "prune", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            run("halved", recipe)
        changed.setattr(
            compress, "prune", lambda *it, **options: pruned.append(it[1]) or prune(*it, **options)
        )
        run("halved", recipe)
    assert len(pruned) == 3
    assert pruned[1] == pruned[2] != pruned[0]
    run("whole", recipe)
    assert same("halved", "whole")


def test_what_was_removed_by_hand_is_not_put_back(run: Callable[..., Outcome]) -> None:
    by_hand = Decision(rule="manual", budget=None, options=Options(units=(Unit(2),)), prompts=2)
    assert len(run("student", replace(RECIPE, decision=by_hand, gate=NEVER)).tries) == 1


def test_a_student_that_got_worse_is_made_of_its_best(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its rate is nonsense from the fourth step on.
    rate_at = compress.Schedule.rate_at
    monkeypatch.setattr(
        compress.Schedule, "rate_at", lambda self, step: rate_at(self, step) if step < 3 else 1.0
    )
    outcome = run("student", replace(RECIPE, check_every=2))
    history = history_from_json(read_json(Path("student/history.json")))
    assert history.checks[0].velocity_error < history.checks[1].velocity_error
    assert outcome.tries[0].steps == 2
    assert outcome.stages[-1].velocity_error == history.checks[0].velocity_error


def test_another_plan_is_not_mixed_with_one_that_was_begun(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compress, "prune", stop)
    with pytest.raises(KeyboardInterrupt):
        run("student")
    other = replace(RECIPE, decision=replace(RECIPE.decision, budget=Budget(ratio=0.3)))
    with pytest.raises(ToolchainError, match=r"plans with other settings: ratio is 0\.4 there, 0\.3 now"):
        run("student", other)


def test_a_student_that_fails_its_gate_is_written_and_ends_in_3(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--steps", "0", "--per-task", "0", "--remove", "2", "--num-prompts", "2")
    monkeypatch.setattr(
        sys, "argv", ["hptool", "compress", str(tiny_path), *few, "--gate", "velocity<=0", "-o", "student"]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 3
    assert "student was written, but did not pass its gate velocity<=0: " in capsys.readouterr().err
    assert open_model("student").num_parameters > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", "'tensorbord' is none that accelerate knows"),
        ("wandb", "not installed here.*pip install wandb"),
    ],
)
def test_a_tracker_that_is_not_to_be_had_is_refused_before_any_work(
    name: str, message: str, run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(ToolchainError, match=message):
        run("student", trackers=(name,))
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "alike", "message"),
    [
        (replace(RECIPE, accumulate=3), Processes(), "4 states does not fall into 3 equal shares"),
        (replace(RECIPE, turn=2), Processes(number=2, sharded=True), "sharded .* do not rest"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_before_any_work(
    run: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
    recipe: Recipe,
    alike: Processes,
    message: str,
) -> None:
    monkeypatch.setattr(distill, "processes", lambda: alike)
    with pytest.raises(ToolchainError, match=message):
        run("student", recipe)
    assert list(Path().iterdir()) == []


def test_states_that_do_not_fit_into_memory_are_refused_before_any_work(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(ToolchainError, match=r"states of 4 paintings .* hptool precompute .* --data DIR"):
        run("student")
    assert list(Path().iterdir()) == []


def test_a_configuration_of_deepspeed_that_says_otherwise_is_refused_before_any_work(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    zero = Zero(stage=2, offload=False, numbers={"train_micro_batch_size_per_gpu": 4})
    monkeypatch.setattr(compress, "processes", lambda: Processes(zero=zero))
    with pytest.raises(ToolchainError, match="says train_micro_batch_size_per_gpu 4, and this run has 2"):
        run("student", replace(RECIPE, accumulate=2))
    assert list(Path().iterdir()) == []
