"""Signals end long work where nothing is half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from toolchain.interrupts import Stopped, held, stoppable


@pytest.fixture(autouse=True)
def _usual() -> Iterator[None]:
    """Signals do what they do in a terminal; a shell has those ignored that it starts in the background."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@BOTH
def test_a_signal_raises_where_work_may_be_stopped(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=number.name), stoppable():
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_what_catches_errors_does_not_catch_it() -> None:
    assert not issubclass(Stopped, Exception)


def test_a_second_signal_does_what_it_always_did() -> None:
    def work() -> None:
        with stoppable():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        work()


@BOTH
def test_a_signal_is_held_back_to_the_end_of_a_block(number: signal.Signals) -> None:
    told = []

    def work() -> None:
        with stoppable(), held() as asked:
            told.append(asked())
            signal.raise_signal(number)
            told.append(asked())
        told.append("never")

    with pytest.raises(Stopped, match=number.name):
        work()
    assert told == [False, True]


@pytest.mark.parametrize("times", [1, 2])
def test_a_held_signal_does_its_usual_work_and_a_second_one_at_once(times: int) -> None:
    done = []

    def work() -> None:
        with held():
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
            done.append("the rest of the block")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert len(done) == 2 - times


def test_an_error_in_a_block_is_not_hidden_by_a_signal() -> None:
    def work() -> None:
        with held():
            signal.raise_signal(signal.SIGINT)
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        work()


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable(), held() as asked:
            signal.raise_signal(signal.SIGINT)
            assert not asked()
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_leave_signals_alone() -> None:
    found = []

    def work() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with stoppable(), held() as asked:
            found.append((signal.getsignal(signal.SIGTERM) is before, asked()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(True, False)]
