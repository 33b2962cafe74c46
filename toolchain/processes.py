"""The processes of a run: one, unless accelerate's launcher started more.

All run the same program on the same inputs and hold the same values. Work that falls into pieces is shared
out and its results are brought together again; files are written by the first. A process that is alone pays
nothing for that: nothing here touches `torch.distributed` then.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

from toolchain.errors import ToolchainError
from toolchain.zero import Zero, take_zero

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")
_R = TypeVar("_R")

_PATIENCE = timedelta(days=1)
"""How long processes wait for what one does alone. One that died is noticed at once all the same."""

_DEVICE = "ACCELERATE_TORCH_DEVICE"
"""By this name accelerate, too, takes a device."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Which of how many this process is."""

    rank: int = 0
    number: int = 1
    sharded: bool = False
    """Whether each is to hold a share of every weight that it trains (FSDP2) instead of all."""
    zero: Zero | None = None
    """What a configuration of DeepSpeed asks for, if there is one."""
    group: Any = None
    """Of `torch.distributed`, for values that are no tensors on the device; None if alone."""

    @property
    def device(self) -> torch.device:
        """Where this process computes: what the launcher gave it; alone, a GPU if there is one."""
        import torch

        if self.number > 1:
            from accelerate import PartialState

            found: torch.device = PartialState().device
            return found if found.index is None or found.type != "cpu" else torch.device("cpu")
        return torch.device(os.environ.get(_DEVICE, "cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def is_first(self) -> bool:
        """Whether it is this one that writes files and speaks to the user."""
        return self.rank == 0

    def owns(self, index: int) -> bool:
        """Whether `each` gives this process the item of that index."""
        return index % self.number == self.rank

    def each(self, items: Sequence[_T], work: Callable[[_T], _R]) -> Iterator[_R]:
        """The results of all items in their order, each worked out by one process.

        Every process has to take all of them. Results come as soon as their turn is done, so that they can be
        kept against an interruption.

        Raises:
            ToolchainError: What `work` raised, in every process.
        """
        for start in range(0, len(items), self.number):
            turn = items[start : start + self.number]
            mine = turn[self.rank : self.rank + 1]
            yield from self._gather(partial(work, *mine) if mine else None, len(turn))

    def first(self, action: Callable[[], _R]) -> _R:
        """The result of something that the first process does alone.

        Raises:
            ToolchainError: What it raised, in every process.
        """
        return self._gather(action if self.is_first else None, 1)[0]

    def gather(self, value: _R) -> list[_R]:
        """What every process has."""
        return self._gather(lambda: value, self.number)

    def _gather(self, action: Callable[[], _R] | None, count: int) -> list[_R]:
        """What the first so many processes have done; an error of the user's is everyone's."""
        if self.number == 1:
            assert action is not None
            return [action()]
        from torch import distributed

        mine: tuple[_R | None, ToolchainError | None] = (None, None)
        try:
            if action is not None:
                mine = (action(), None)
        except ToolchainError as error:
            mine = (None, error)
        found: list[Any] = [None] * self.number
        distributed.all_gather_object(found, mine, group=self.group)
        for _, raised in found:
            if raised is not None:
                raise raised
        return [result for result, _ in found[:count]]


def use_device(name: str) -> None:
    """Compute on a device from now on.

    Raises:
        ToolchainError: It is not to be had, or a launcher has given this process its own.
    """
    import torch

    if processes().number > 1:
        raise ToolchainError(
            "of several processes each gets its device from the launcher; leave --device out"
        )
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ToolchainError(f"the device {name!r} cannot be used: {reason}") from error
    os.environ[_DEVICE] = name


def lost_others(error: Exception) -> bool:
    """Whether it says no more than that another process is gone."""
    from torch import distributed

    return isinstance(error, distributed.DistError) or "by peer" in str(error)


@cache
def processes() -> Processes:
    """Those of this run.

    Raises:
        ToolchainError: accelerate's configuration asks for what there is not.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16"):
        raise ToolchainError(
            f"accelerate's configuration asks for mixed_precision {precision}; products are bfloat16 here, "
            "whatever it says, so make that 'no'"
        )
    if "LOCAL_RANK" not in os.environ:  # no launcher
        return Processes()
    import torch
    from accelerate import PartialState

    zero = take_zero()
    state = PartialState(cpu=not torch.accelerator.is_available())
    return Processes(
        rank=state.process_index,
        number=state.num_processes,
        sharded=state.num_processes > 1 and os.environ.get("ACCELERATE_USE_FSDP") == "true",
        zero=zero,
        group=torch.distributed.new_group(backend="gloo", timeout=_PATIENCE),
    )
