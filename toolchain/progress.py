"""How long work says how far it is, without knowing who listens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

__all__ = ["Bar", "silent"]


class Bar(Protocol):
    """Starts progress bars."""

    def __call__(
        self, name: str, total: int | None, /, *, unit: str = "", each: int = 1
    ) -> Callable[..., None]:
        """Start one.

        Args:
            name: Of the work.
            total: Steps it takes; None if nobody knows.
            unit: What is done in a step, to show how much of it is done a second; nothing for steps of
                different sizes.
            each: So many a step.

        Returns:
            What advances it by a step. It takes anything and heeds `note`, a text to show behind the bar, and
            `done`, the number of steps done: where work goes on that was begun before, they are not one more.
        """


def silent(_: str, __: int | None, /, *, unit: str = "", each: int = 1) -> Callable[..., None]:
    """A bar that nobody sees."""
    return lambda *_, **__: None
