"""What accompanies a distillation: its history, looks at the student, trackers and the progress bar."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from toolchain.families.view import Model
from toolchain.gate import Gate
from toolchain.history import Check, HistoryLog
from toolchain.judge import Judge, Stage, write_grid
from toolchain.optimize import Checks, Schedule
from toolchain.trackers import Tracker

PICTURES = "pictures"


@dataclass(kw_only=True)
class Watch:
    """Told of every step, and asked now and then how the student is."""

    student: Model
    judge: Judge
    gate: Gate | None
    schedule: Schedule
    batch_size: int
    num_pictures: int
    """Painted at every check; 0 for none."""
    log: HistoryLog | None
    """None where another process keeps it, and the pictures."""
    pictures: Path
    """Directory of their grids."""
    trackers: Sequence[Tracker]
    advance: Callable[..., None]
    _note: str = ""
    _since: float = field(default_factory=time.perf_counter)

    def checks(self, every: int) -> Checks:
        """Looks at the student, the first that passes the gate being the last."""
        enough = None if self.gate is None else self.gate.harm(self.gate.bound)
        return Checks(every=every, harm=self._check, enough=enough)

    def step(self, step: int, loss: float) -> None:
        """As `optimize_` says it."""
        rate, now = self.schedule.rate_at(step), time.perf_counter()
        if self.log is not None:
            self.log.step(step, loss, rate)
        values = {
            "loss": loss,
            "learning_rate": rate,
            "states_per_second": self.batch_size / (now - self._since),
        }
        for tracker in self.trackers:
            tracker.log(step + 1, values)
        self.advance(note=f"loss {loss:.4f}{self._note}", done=step + 1)
        self._since = now

    def harm(self, stage: Stage) -> float:
        """How bad a student is: by the gate's metric, or else by its velocity error."""
        if self.gate is None or stage.gate is None:
            return stage.velocity_error
        return self.gate.harm(stage.gate)

    def close(self) -> None:
        """Let trackers write what they hold."""
        for tracker in self.trackers:
            tracker.finish()

    def _check(self, step: int) -> float:
        found = self.judge(f"step {step}", self.student)
        score = None if found.score is None else found.score.mean
        check = Check(step=step, velocity_error=found.velocity_error, score=score, gate=found.gate)
        values = {"velocity_error": check.velocity_error, "score": score, "gate": check.gate}
        numbers = {f"check/{name}": value for name, value in values.items() if value is not None}
        for tracker in self.trackers:
            tracker.log(step, numbers)
        if self.num_pictures:
            painted = self.judge.paint(self.student, self.num_pictures)
            if self.log is not None:
                write_grid(self.pictures / f"step-{step:08}.png", painted)
            for tracker in self.trackers:
                tracker.show(step, painted)
        if self.log is not None:
            self.log.check(check)
        found_then = f"velocity error {found.velocity_error:.4f}"
        if self.gate is not None:
            found_then = f"{self.gate.metric} {found.gate:.4f}"
        self._note = f"  at {step}: {found_then}"
        self._since = time.perf_counter()
        return self.harm(found)
