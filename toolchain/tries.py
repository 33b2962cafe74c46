"""Plans tried one after the other, each removing less than the last, until a student passes its gate."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toolchain.gate import Gate
from toolchain.pieces import Pieces
from toolchain.plan import CompressionPlan
from toolchain.rules import format_units


@dataclass(frozen=True, kw_only=True)
class Try:
    """What became of one plan."""

    removed: str
    """As `--remove` takes it."""
    ratio_reached: float
    flops_ratio_reached: float
    steps: int
    """Of distillation that the student has behind it."""
    gate: float | None
    """What the metric of the gate gave in the end; None without a gate."""
    passed: bool | None
    """The same."""


class Tries:
    """Those that were made, of this run and of the runs it goes on from.

    Args:
        work: Directory for them, each having one of its own in it.
        settings: What they depend on, as JSON takes it.
        gate: What a student has to pass.
        most: After so many the last one is taken as it is.

    Raises:
        ToolchainError: The directory holds tries of another run.
    """

    def __init__(self, work: Path, settings: dict[str, Any], *, gate: Gate | None, most: int) -> None:
        self._work, self._gate, self._most = work, gate, most
        self._failed = Pieces(work / "failed", settings, work="tries")
        self.made: list[Try] = []
        while (name := self._name) in self._failed:
            self.made.append(Try(**self._failed[name]))

    @property
    def directory(self) -> Path:
        """Of the next one."""
        return self._work / self._name

    def add(self, plan: CompressionPlan, steps: int, value: float | None) -> bool:
        """Note one, and say whether there is to be another.

        Args:
            plan: What was removed.
            steps: Of distillation.
            value: What the gate's metric gave.
        """
        tried = Try(
            removed=format_units(plan.removed),
            ratio_reached=plan.ratio_reached,
            flops_ratio_reached=plan.flops_ratio_reached,
            steps=steps,
            gate=value,
            passed=None if self._gate is None or value is None else self._gate.passes(value),
        )
        again = tried.passed is False and len(self.made) + 1 < self._most
        if again:
            name, place = self._name, self.directory
            self._failed[name] = asdict(tried)
            shutil.rmtree(place, ignore_errors=True)
        self.made.append(tried)
        return again

    @property
    def _name(self) -> str:
        return f"try-{len(self.made) + 1}"
