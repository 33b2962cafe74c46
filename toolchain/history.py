"""What a training went through: a log that survives what befalls it, and the file made of it in the end."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import ToolchainError

HISTORY_FILE = "history.json"
_SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Check:
    """What a model was found to be in the middle of its training."""

    step: int
    """Steps taken."""
    velocity_error: float
    score: float | None
    """Of ShapesEval; None where it was not asked for."""
    gate: float | None
    """What the metric of the gate gave; None without a gate."""


@dataclass(frozen=True, kw_only=True)
class History:
    """Of one training. It knows no time: a run that was stopped and resumed has the same as any other."""

    losses: tuple[float, ...]
    """Of every step."""
    rates: tuple[float, ...]
    """The learning rate of every step."""
    checks: tuple[Check, ...]

    def __post_init__(self) -> None:
        if len(self.losses) != len(self.rates):
            raise ToolchainError(f"this history has {len(self.losses)} losses and {len(self.rates)} rates")


def history_to_json(history: History) -> dict[str, Any]:
    """As it is written."""
    return {"schema_version": _SCHEMA_VERSION, **asdict(history)}


def history_from_json(value: dict[str, Any]) -> History:
    """Read one strictly.

    Raises:
        ToolchainError: It is none.
    """
    version = value.get("schema_version")
    if version != _SCHEMA_VERSION:
        raise ToolchainError(f"this is no history of schema version {_SCHEMA_VERSION}, but of {version!r}")
    try:
        rest = {key: item for key, item in value.items() if key != "schema_version"}
        checks = tuple(Check(**item) for item in rest.pop("checks"))
        history = History(**{key: tuple(item) for key, item in rest.items()}, checks=checks)
    except (KeyError, TypeError) as error:
        raise ToolchainError(f"this history is damaged: {error}") from error
    numbers = (*history.losses, *history.rates, *(item.velocity_error for item in checks))
    if not all(isinstance(item, float | int) and math.isfinite(item) for item in numbers):
        raise ToolchainError("this history is damaged: it holds what is no number")
    return history


class HistoryLog:
    """A line of JSON for every step and every check, appended as they happen.

    A run that goes on from a checkpoint repeats the steps after it, and what was written of these before
    no longer counts. Nor does a last line that was not finished.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        whole = path.read_bytes() if path.exists() else b""
        with path.open("ab") as file:
            file.truncate(whole.rfind(b"\n") + 1)

    def step(self, step: int, loss: float, rate: float) -> None:
        """Of a step, counted from 0."""
        self._append({"step": step, "loss": loss, "rate": rate})

    def check(self, check: Check) -> None:
        """Of a look at the model."""
        self._append(asdict(check))

    def read(self, steps: int) -> History:
        """The history of so many steps."""
        losses: list[float] = []
        rates: list[float] = []
        checks: dict[int, Check] = {}
        for line in self._path.read_text(encoding="utf-8").splitlines():
            item = json.loads(line)
            if "loss" in item:
                losses[item["step"] :], rates[item["step"] :] = [item["loss"]], [item["rate"]]
            else:
                checks[item["step"]] = Check(**item)
        return History(
            losses=tuple(losses[:steps]),
            rates=tuple(rates[:steps]),
            checks=tuple(checks[step] for step in sorted(checks) if step <= steps),
        )

    def _append(self, item: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(item) + "\n")
