"""The line in front of the model, with a painter that does as the test says."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from queue import Queue
from typing import Any

import pytest
from PIL import Image

from deploy.errors import Cancelled, DeployError
from deploy.queue import Ended, Event, Job, Picture, QueueFull, Request, Step, Stopping, Worker

TIMEOUT = 10


class Result:
    def __init__(self, seed: int) -> None:
        self.images = [Image.new("RGB", (2, 1), (seed, 0, 0))]
        self.timings_ms: dict[str, Any] = {"steps": [1.0, 1.0]}


class FakePainter:
    """Takes two steps for a picture, each as soon as the test allows it."""

    def __init__(self) -> None:
        self.painted: list[dict[str, Any]] = []
        self.began = threading.Semaphore(0)
        self.allowed = threading.Semaphore(0)
        self.error: Exception | None = None

    def __call__(
        self,
        prompt: str,
        negative_prompt: str = "",
        *,
        on_step: Callable[[int, int], None],
        cancel: Callable[[], bool],
        **options: Any,
    ) -> Result:
        self.painted.append({"prompt": prompt, "negative_prompt": negative_prompt, **options})
        for step in range(2):
            if cancel():
                raise Cancelled("cancelled")
            self.began.release()
            assert self.allowed.acquire(timeout=TIMEOUT)
            if self.error is not None:
                raise self.error
            on_step(step + 1, 2)
        return Result(options["seed"])

    def allow(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.allowed.release()

    def wait_for_step(self) -> None:
        assert self.began.acquire(timeout=TIMEOUT)


class Client:
    """A job and what it heard."""

    def __init__(self, worker: Worker[FakePainter], **request: Any) -> None:
        self.events: Queue[Event] = Queue()
        self.job = Job(Request(**{"prompt": "a star", **request}), self.events.put)
        self.before = worker.submit(self.job)

    def rest(self) -> list[Event]:
        """All events up to the end."""
        heard: list[Event] = []
        while not heard or not isinstance(heard[-1], Ended):
            heard.append(self.events.get(timeout=TIMEOUT))
        return heard

    def error(self) -> Exception | None:
        last = self.rest()[-1]
        assert isinstance(last, Ended)
        return last.error


@pytest.fixture
def painter() -> FakePainter:
    return FakePainter()


@pytest.fixture
def worker(painter: FakePainter) -> Iterator[Worker[FakePainter]]:
    worker = Worker(lambda: painter, size=2)
    worker.start()
    yield worker
    worker.drain(0)
    painter.allow(100)
    assert worker.join(TIMEOUT)


def test_every_step_and_every_picture_is_heard(worker: Worker[FakePainter], painter: FakePainter) -> None:
    painter.allow(4)
    client = Client(worker, negative_prompt="a square", num_images=2, steps=2, seed=7, height=16, width=32)
    heard = client.rest()
    assert [(event.picture, event.step, event.steps) for event in heard if isinstance(event, Step)] == [
        (0, 1, 2),
        (0, 2, 2),
        (1, 1, 2),
        (1, 2, 2),
    ]
    pictures = [event for event in heard if isinstance(event, Picture)]
    assert [(event.picture, event.seed, event.size) for event in pictures] == [(0, 7, (2, 1)), (1, 8, (2, 1))]
    for event in pictures:
        with Image.open(io.BytesIO(event.png)) as image:
            assert image.getpixel((0, 0)) == (event.seed, 0, 0)
        assert event.seconds > 0
    assert heard[-1] == Ended(error=None)
    assert [isinstance(event, Picture) for event in heard].index(True) == 2  # shown when done, not at the end
    assert painter.painted[1] == {
        "prompt": "a star",
        "negative_prompt": "a square",
        "steps": 2,
        "guidance_scale": None,
        "height": 16,
        "width": 32,
        "seed": 8,
    }


def test_first_come_is_first_served(worker: Worker[FakePainter], painter: FakePainter) -> None:
    first = Client(worker, prompt="first")
    painter.wait_for_step()
    rest = [Client(worker, prompt=prompt) for prompt in ("second", "third")]
    assert [client.before for client in (first, *rest)] == [0, 1, 2]
    assert worker.depth == 2
    painter.allow(6)
    assert [client.error() for client in (first, *rest)] == [None] * 3
    assert [painted["prompt"] for painted in painter.painted] == ["first", "second", "third"]


def test_full_line_says_when_to_come_again(worker: Worker[FakePainter], painter: FakePainter) -> None:
    clients = [Client(worker, num_images=3)]
    painter.wait_for_step()
    clients += [Client(worker), Client(worker)]
    with pytest.raises(QueueFull, match="2 requests wait already") as full:
        Client(worker)
    assert full.value.retry_after == 1
    worker._seconds_per_picture = 10.0
    with pytest.raises(QueueFull, match="in 30 s") as full:  # three pictures are left to paint
        Client(worker)
    assert full.value.retry_after == 30
    painter.allow(2)
    while not isinstance(clients[0].events.get(timeout=TIMEOUT), Picture):
        pass
    with pytest.raises(QueueFull) as full:  # two are left, and the mean came closer to the first one's time
        Client(worker)
    assert 1 < full.value.retry_after <= 2 * 10 * 0.8 + 1
    painter.allow(8)
    assert [client.error() for client in clients] == [None] * 3


def test_waiting_job_that_is_cancelled_frees_its_place(
    worker: Worker[FakePainter], painter: FakePainter
) -> None:
    first = Client(worker)
    painter.wait_for_step()
    second, third = Client(worker), Client(worker)
    wish = DeployError("not wanted")
    worker.cancel(second.job, wish)
    assert second.error() is wish
    fourth = Client(worker, prompt="fourth")
    painter.allow(6)
    assert [client.error() for client in (first, third, fourth)] == [None] * 3
    assert len(painter.painted) == 3


def test_running_job_that_is_cancelled_stops_at_the_next_step(
    worker: Worker[FakePainter], painter: FakePainter
) -> None:
    first, second = Client(worker), Client(worker, prompt="second")
    painter.wait_for_step()
    wish = DeployError("not wanted")
    worker.cancel(first.job, wish)
    assert first.rest() == [Ended(error=wish)]  # at once, while the step goes on
    painter.allow()
    painter.wait_for_step()  # of the second: the first took one step of two
    assert [painted["prompt"] for painted in painter.painted] == ["a star", "second"]
    painter.allow(2)
    assert second.error() is None
    assert first.events.empty()  # nothing is heard after the end


def test_cancelling_what_is_done_changes_nothing(worker: Worker[FakePainter], painter: FakePainter) -> None:
    painter.allow(2)
    client = Client(worker)
    assert client.error() is None
    worker.cancel(client.job, DeployError("too late"))
    assert client.events.empty()


@pytest.mark.parametrize("error", [DeployError("no picture"), RuntimeError("a bug"), MemoryError()])
def test_failed_picture_does_not_stop_the_worker(
    worker: Worker[FakePainter], painter: FakePainter, error: Exception
) -> None:
    painter.error = error
    painter.allow()
    assert Client(worker).error() is error
    painter.error = None
    painter.allow(2)
    assert Client(worker).error() is None


def test_model_that_does_not_open_says_why() -> None:
    def fail() -> FakePainter:
        raise DeployError("damaged")

    worker = Worker(fail, size=1)
    worker.start()
    assert str(worker.opened.exception(timeout=TIMEOUT)) == "damaged"
    assert worker.join(TIMEOUT)


def test_draining_refuses_who_waits_and_finishes_what_is_painted(
    worker: Worker[FakePainter], painter: FakePainter
) -> None:
    running = Client(worker)
    painter.wait_for_step()
    waiting = Client(worker)
    worker.drain(TIMEOUT)
    assert isinstance(waiting.error(), Stopping)
    with pytest.raises(Stopping):
        Client(worker)
    painter.allow(2)
    assert running.error() is None
    assert worker.join(TIMEOUT)


def test_draining_gives_up_what_is_painted_after_the_grace(
    worker: Worker[FakePainter], painter: FakePainter
) -> None:
    running = Client(worker)
    painter.wait_for_step()
    worker.drain(0.05)
    assert isinstance(running.error(), Stopping)
    assert not worker.join(0)  # it is in the middle of a step
    painter.allow()
    assert worker.join(TIMEOUT)


def test_many_clients_at_once_lose_nothing(painter: FakePainter) -> None:
    worker = Worker(lambda: painter, size=4)
    worker.start()
    painter.allow(1000)
    outcomes: Queue[object] = Queue()

    def ask() -> None:
        try:
            outcomes.put(Client(worker).error())
        except QueueFull as full:
            outcomes.put(full)

    threads = [threading.Thread(target=ask) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    found = [outcomes.get(timeout=TIMEOUT) for _ in threads]
    assert len(painter.painted) == found.count(None) >= 1
    assert all(outcome is None or isinstance(outcome, QueueFull) for outcome in found)
    worker.drain(0)
    assert worker.join(TIMEOUT)
