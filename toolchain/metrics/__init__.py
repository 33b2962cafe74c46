"""What an analysis measures harm by: the protocol of a metric, and how one is found by its name.

A metric is a frozen dataclass whose fields are its options. Any installed package can add one through an
entry point of the group `hptool.metrics`; those that come with the tool are found the same way.
"""

from __future__ import annotations

import dataclasses
import typing
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from toolchain.errors import ToolchainError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

GROUP = "hptool.metrics"


class Metric(ABC):
    """What both kinds have in common; subclass one of the two below."""

    name: ClassVar[str]

    @property
    def options(self) -> dict[str, Any]:
        """As given, for the record."""
        subject: Any = self
        fields = dataclasses.fields(subject) if dataclasses.is_dataclass(subject) else ()
        found = {field.name: getattr(self, field.name) for field in fields}
        return {key: str(value) if isinstance(value, Path) else value for key, value in found.items()}


class StateMetric(Metric):
    """Judges velocities in states the whole model passes through; no picture is painted."""

    @abstractmethod
    def errors(self, predicted_BCHW: torch.Tensor, teacher_BCHW: torch.Tensor) -> torch.Tensor:
        """How far a velocity is from the whole model's, [B]; larger is worse, 0 where both agree."""


class PictureMetric(Metric):
    """Judges pictures painted from prompts."""

    @abstractmethod
    def check(self, prompts: Sequence[str]) -> None:
        """Refuse, before anything is painted, prompts whose pictures cannot be judged.

        Raises:
            ToolchainError: There are such prompts.
        """

    @abstractmethod
    def scores(self, prompts: Sequence[str], pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """Of pictures [N, height, width, 3], one for each prompt, [N]; larger is better."""


def known_metrics() -> tuple[str, ...]:
    """Names of all metrics that are installed."""
    return tuple(sorted({entry.name for entry in entry_points(group=GROUP)}))


def open_metric(text: str) -> StateMetric | PictureMetric:
    """Make the metric that a text like `clip:directory=models/clip` asks for.

    Args:
        text: A name; behind a colon its options as `key=value`, with commas between.

    Raises:
        ToolchainError: There is no such metric or option, or an option is missing or malformed.
    """
    name, colon, rest = text.partition(":")
    found = {entry.value: entry for entry in entry_points(group=GROUP, name=name)}
    if len(found) != 1:
        problem = f"is installed more than once ({', '.join(sorted(found))})" if found else "is not installed"
        raise ToolchainError(
            f"the metric {name!r} {problem}; there are {', '.join(known_metrics()) or 'none'}"
        )
    (source, entry), *_ = found.items()
    kind = entry.load()
    if not (isinstance(kind, type) and issubclass(kind, (StateMetric, PictureMetric))):
        raise ToolchainError(
            f"the metric {name!r} is {source}, which is neither a StateMetric nor a PictureMetric"
        )
    return kind(**_options(name, kind, rest.split(",") if colon else []))


def _options(name: str, kind: type, items: list[str]) -> dict[str, Any]:
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    hints = {field.name: typing.get_type_hints(kind)[field.name] for field in fields}
    known = f"the metric {name!r} takes {', '.join(hints) or 'no options'}"
    values: dict[str, Any] = {}
    for item in items:
        key, _, value = item.partition("=")
        if key not in hints:
            raise ToolchainError(f"{item!r} is no option: {known}, as key=value with commas between")
        if key in values or not value:
            raise ToolchainError(f"{key} is {'given twice' if value else 'empty'}: {known}")
        values[key] = _convert(f"{name}:{key}", hints[key], value)
    missing = dataclasses.MISSING
    for field in fields:
        if field.name not in values and field.default is missing and field.default_factory is missing:
            raise ToolchainError(f"the metric {name!r} needs {field.name}: write {name}:{field.name}=VALUE")
    return values


def _convert(option: str, hint: Any, value: str) -> Any:
    # `Path | None` is asked for as `Path`: leaving an option out is how None is said.
    kind = next(item for item in (*typing.get_args(hint), hint) if item is not type(None))
    try:
        return kind(value)
    except ValueError as error:
        raise ToolchainError(f"{option} is {value!r}, which is no {kind.__name__}") from error
