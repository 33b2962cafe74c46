"""One model, one thread that paints, and a line of bounded length in front of it."""

from __future__ import annotations

import io
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Condition, Lock, Thread, Timer
from typing import Any, Generic, Protocol, TypeVar

from deploy.errors import DeployError

__all__ = [
    "Ended",
    "Event",
    "Job",
    "Painter",
    "Picture",
    "QueueFull",
    "Request",
    "Step",
    "Stopping",
    "Worker",
]

logger = logging.getLogger(__name__)

_WEIGHT_OF_LAST = 0.2
"""Of the last picture in the mean time of a picture: the mean follows when requests change."""


class QueueFull(DeployError):
    """As many jobs wait as may."""

    def __init__(self, size: int, retry_after: int) -> None:
        super().__init__(
            f"{size} requests wait already, which is as many as may. Try again in {retry_after} s."
        )
        self.retry_after = retry_after
        """Seconds until a place is likely to be free."""


class Stopping(DeployError):
    """The server is shutting down."""

    def __init__(self) -> None:
        super().__init__("The server is shutting down and paints no more. Try again when it is back.")


@dataclass(frozen=True, kw_only=True)
class Request:
    """Pictures of one prompt. None takes the bundle's default."""

    prompt: str
    negative_prompt: str = ""
    num_images: int = 1
    steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    seed: int = 0
    """Of the first picture; each next one takes the number after."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A sampling step is done."""

    picture: int
    """Which of the job's pictures, from 0."""
    step: int
    """How many of its steps are done."""
    steps: int


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture is done."""

    picture: int
    seed: int
    size: tuple[int, int]
    """Width and height in pixels."""
    png: bytes
    seconds: float
    """From its first step, or the text before it, to the encoded file."""
    timings_ms: Mapping[str, Any]
    """As the pipeline gave them."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """Nothing more will come of the job."""

    error: Exception | None
    """Why it has not all its pictures; None if it has."""


Event = Step | Picture | Ended


class _Image(Protocol):
    @property
    def size(self) -> tuple[int, int]: ...
    def save(self, fp: io.BytesIO, format: str) -> None: ...


class _Result(Protocol):
    @property
    def images(self) -> Sequence[_Image]: ...
    @property
    def timings_ms(self) -> Mapping[str, Any]: ...


class Painter(Protocol):
    """What of `EdgePipeline` the worker calls."""

    def __call__(
        self,
        prompt: str,
        negative_prompt: str = "",
        *,
        steps: int | None,
        guidance_scale: float | None,
        height: int | None,
        width: int | None,
        seed: int,
        on_step: Callable[[int, int], None],
        cancel: Callable[[], bool],
    ) -> _Result:
        """Make a picture."""


P = TypeVar("P", bound=Painter)


class Job:
    """A request in the line, and who hears of it."""

    def __init__(self, request: Request, hear: Callable[[Event], None]) -> None:
        """Take a request.

        Args:
            hear: Called with each event, from any thread but one at a time; never again after `Ended`.
        """
        self.request = request
        self.pictures_left = request.num_images
        self._hear = hear
        self._lock = Lock()
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it: the worker stops at the next step."""
        return self._ended

    def tell(self, event: Event) -> None:
        """Pass an event on, unless the job has ended."""
        with self._lock:
            if not self._ended:
                self._ended = isinstance(event, Ended)
                self._hear(event)


class Worker(Generic[P]):
    """The only thread that touches the model."""

    def __init__(self, open_painter: Callable[[], P], *, size: int) -> None:
        """Prepare; `start` begins.

        Args:
            open_painter: Called first, in the worker's thread.
            size: Most jobs that wait, besides the one that is painted.
        """
        self.size = size
        self.opened: Future[P] = Future()
        """The painter, once it is there, or why it will not be."""
        self._open = open_painter
        self._jobs: deque[Job] = deque()
        self._running: Job | None = None
        self._began = 0.0
        self._seconds_per_picture: float | None = None
        self._closing = False
        self._change = Condition()
        # A daemon, for the end of the process cannot wait for a model that is being opened.
        self._thread = Thread(target=self._work, name="painter", daemon=True)

    @property
    def depth(self) -> int:
        """Jobs that wait."""
        return len(self._jobs)

    def start(self) -> None:
        """Open the painter and begin to work, in the worker's own thread."""
        self._thread.start()

    def submit(self, job: Job) -> int:
        """Put a job at the end of the line.

        Returns:
            How many jobs come before it, the one that is being painted included.

        Raises:
            QueueFull: As many wait as may.
            Stopping: `drain` was called.
        """
        with self._change:
            self.check_place()
            self._jobs.append(job)
            self._change.notify()
            return len(self._jobs) - 1 + (self._running is not None)

    def check_place(self) -> None:
        """Raise what `submit` would for any job now, without looking at one."""
        with self._change:
            if self._closing:
                raise Stopping
            if len(self._jobs) + (self._running is not None) > self.size:
                raise QueueFull(self.size, self._seconds_until_a_place())

    def cancel(self, job: Job, error: Exception) -> None:
        """End a job, whether it waits or is being painted; one that has ended stays as it is."""
        with self._change:
            if job in self._jobs:
                self._jobs.remove(job)
        job.tell(Ended(error=error))

    def drain(self, grace: float) -> None:
        """Take no more jobs, refuse those that wait, and give the one being painted so many seconds."""
        with self._change:
            self._closing = True
            waiting, running = list(self._jobs), self._running
            self._jobs.clear()
            self._change.notify()
        for job in waiting:
            job.tell(Ended(error=Stopping()))
        if running is not None:
            timer = Timer(grace, running.tell, [Ended(error=Stopping())])
            timer.daemon = True
            timer.start()

    def join(self, timeout: float) -> bool:
        """Wait until the thread has ended, which it does after `drain`, and say whether it has."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            painter = self._open()
        except Exception as error:
            self.opened.set_exception(error)
            return
        self.opened.set_result(painter)
        while (job := self._next()) is not None:
            start = time.perf_counter()
            try:
                self._paint(painter, job)
                job.tell(Ended(error=None))
                logger.info(
                    "Painted %d of %d asked for, in %.2f s.",
                    job.request.num_images - job.pictures_left,
                    job.request.num_images,
                    time.perf_counter() - start,
                )
            except Exception as error:
                # A job that has ended was cancelled, and whoever asked for it knows.
                if not job.ended:
                    logger.warning("A picture failed: %s", error, exc_info=not isinstance(error, DeployError))
                    job.tell(Ended(error=error))

    def _next(self) -> Job | None:
        with self._change:
            self._running = None
            self._change.wait_for(lambda: bool(self._jobs) or self._closing)
            if not self._jobs:
                return None
            self._running, self._began = self._jobs.popleft(), time.perf_counter()
            return self._running

    def _paint(self, painter: P, job: Job) -> None:
        """Paint a job's pictures one by one: in the memory of one, and each is shown when it is done."""
        request = job.request
        for index in range(request.num_images):
            start = time.perf_counter()

            def on_step(done: int, steps: int, index: int = index) -> None:
                job.tell(Step(picture=index, step=done, steps=steps))

            result = painter(
                request.prompt,
                request.negative_prompt,
                steps=request.steps,
                guidance_scale=request.guidance_scale,
                height=request.height,
                width=request.width,
                seed=request.seed + index,
                on_step=on_step,
                cancel=lambda: job.ended,
            )
            # In this thread: a large picture takes longer to encode than anyone else should wait.
            file = io.BytesIO()
            result.images[0].save(file, format="PNG")
            seconds = time.perf_counter() - start
            job.pictures_left -= 1
            mean = self._seconds_per_picture
            self._seconds_per_picture = seconds if mean is None else mean + _WEIGHT_OF_LAST * (seconds - mean)
            job.tell(
                Picture(
                    picture=index,
                    seed=request.seed + index,
                    size=result.images[0].size,
                    png=file.getvalue(),
                    seconds=seconds,
                    timings_ms=result.timings_ms,
                )
            )

    def _seconds_until_a_place(self) -> int:
        """Estimate from the mean time of a picture when the job that is painted will be done."""
        elapsed = time.perf_counter() - self._began
        each = elapsed if self._seconds_per_picture is None else self._seconds_per_picture
        left = self._running.pictures_left if self._running is not None else 0
        return max(1, math.ceil(each * left))
