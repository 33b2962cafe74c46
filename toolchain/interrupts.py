"""SIGTERM and Ctrl-C: long work ends where nothing is half done, and says so."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_Handler = Callable[[int, FrameType | None], Any]


class Stopped(BaseException):
    """Work was asked to end by a signal. What catches errors does not catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)


@contextmanager
def stoppable() -> Iterator[None]:
    """Let the first of these signals raise `Stopped`; a second one ends the process as it usually would."""

    def stop(number: int, _: FrameType | None) -> None:
        for each, before in usual.items():
            signal.signal(each, before)
        raise Stopped(number)

    with _handled_by(stop) as usual:
        yield


@contextmanager
def held() -> Iterator[Callable[[], bool]]:
    """Hold these signals back until the end of the block; yields what tells whether there was one.

    A signal that came meanwhile does at the end what it would have done at once. A second one does so
    immediately.
    """
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if not noted:
            noted.append(number)
            return
        signal.signal(number, usual[number])
        signal.raise_signal(number)

    with _handled_by(note) as usual:
        yield lambda: bool(noted)
    if noted:
        signal.raise_signal(noted[0])


@contextmanager
def _handled_by(handler: _Handler) -> Iterator[dict[int, _Handler | int | None]]:
    """Have signals handled in another way, if this is the thread that may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield {}
        return
    before: dict[int, _Handler | int | None] = {number: signal.getsignal(number) for number in _SIGNALS}
    # Who runs a process in the background may have it ignore Ctrl-C, and then it stays that way.
    ours = [number for number, usual in before.items() if usual is not signal.SIG_IGN]
    try:
        for number in ours:
            signal.signal(number, handler)
        yield before
    finally:
        for number in ours:
            signal.signal(number, before[number])
