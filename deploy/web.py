"""A bundle behind HTTP: OpenAI's images API, a page to try it on, health and metrics."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from importlib.resources import files
from typing import Any

from deploy.bundle import Manifest
from deploy.errors import DeployError, extra
from deploy.gate import Gate
from deploy.images_api import (
    GENERATIONS,
    ApiError,
    Disconnected,
    Generation,
    Limits,
    TimedOut,
    answer,
    api_error,
    completed,
    images,
    model,
    progress,
)
from deploy.pipeline import EdgePipeline
from deploy.queue import Ended, Event, Job, Picture, Step, Worker
from deploy.queue import Request as PictureRequest

with extra("serve"):
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
    from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
    from starlette.exceptions import HTTPException

__all__ = ["build_app"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_KEEPALIVE_SECONDS = 15.0
"""Between two signs of life of a stream: proxies close connections on which nothing comes."""


class Metrics:
    """What Prometheus reads."""

    def __init__(self, depth: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # resident memory and processor time, among others
        self.requests = Counter(
            "hptool_requests", "Requests for pictures.", ["outcome"], registry=self.registry
        )
        self.steps = Histogram(
            "hptool_step_seconds", "Time of a sampling step.", buckets=_SECONDS, registry=self.registry
        )
        self.pictures = Histogram(
            "hptool_picture_seconds",
            "Time of a picture, without waiting.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        queue = Gauge("hptool_queue_depth", "Requests that wait.", registry=self.registry)
        queue.set_function(depth)

    def count(self, outcome: str) -> None:
        """Count a request by what became of it."""
        self.requests.labels(outcome).inc()

    def picture(self, picture: Picture) -> None:
        """Note how long a picture took."""
        self.pictures.observe(picture.seconds)
        for milliseconds in picture.timings_ms["steps"]:
            self.steps.observe(milliseconds / 1000)


class Listener:
    """A request on its way: a job in the line, which ends when the client goes or its time is up."""

    def __init__(
        self,
        asked: PictureRequest,
        worker: Worker[EdgePipeline],
        *,
        http: Request,
        timeout: float,
        metrics: Metrics,
    ) -> None:
        """Put the job into the line.

        Args:
            http: What is watched for the client's going away; its body has been read.

        Raises:
            DeployError: The line takes no more.
        """
        self._worker, self._http, self._metrics = worker, http, metrics
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._job = Job(asked, self._hear)
        self.position = worker.submit(self._job)
        """How many jobs come before it."""
        late = TimedOut(
            f"The picture was not done within {timeout:g} s, waiting included, and was cancelled. "
            "Ask for fewer steps, a smaller size or fewer pictures."
        )
        self._timer = self._loop.call_later(timeout, self._end, late)
        self._watch = asyncio.create_task(self._until_disconnected())

    async def events(self) -> AsyncIterator[Step | Picture | None]:
        """Yield events as they come, None now and then where none does.

        Raises:
            ApiError: Why there are no more.
        """
        try:
            while True:
                try:
                    event = await asyncio.wait_for(self._events.get(), _KEEPALIVE_SECONDS)
                except TimeoutError:
                    yield None
                    continue
                if not isinstance(event, Ended):
                    yield event
                elif event.error is None:
                    return
                else:
                    raise api_error(event.error)
        finally:
            self._timer.cancel()
            self._watch.cancel()
            self._end(Disconnected("The client stopped listening."))

    async def _until_disconnected(self) -> None:
        while (await self._http.receive())["type"] != "http.disconnect":
            pass
        self._end(Disconnected("The client went away before there was a picture."))

    def _end(self, error: Exception) -> None:
        self._worker.cancel(self._job, error)

    def _hear(self, event: Event) -> None:
        match event:
            case Picture():
                self._metrics.picture(event)
            case Ended():
                self._metrics.count("ok" if event.error is None else api_error(event.error).code)
        with suppress(RuntimeError):  # the loop is closed, so nobody listens
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


def build_app(
    worker: Worker[EdgePipeline],
    *,
    name: str,
    created: int = 0,
    limits: Limits = Limits(),  # noqa: B008 – frozen
    token: str | None = None,
    local: bool = True,
) -> FastAPI:
    """Build the web application over a worker.

    Args:
        name: Of the model.
        created: When the model was made, in seconds since 1970.
        token: What clients have to send; None lets everyone in.
        local: Whether to answer only to this machine's own names where there is no token.
    """
    # Its documentation pages would load scripts from elsewhere.
    app = FastAPI(title="hptool", docs_url=None, redoc_url=None)
    metrics = Metrics(lambda: worker.depth)
    app.add_middleware(
        Gate,
        token=token,
        local=local,
        body_bytes=limits.body_bytes,
        check_place=worker.check_place,
        on_refusal=metrics.count,
    )
    page, policy = _page()

    def pipeline() -> EdgePipeline:
        if not worker.opened.done() or worker.opened.exception() is not None:
            raise ApiError(503, "The model is still being opened.", code="model_loading", retry_after=5)
        return worker.opened.result()

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        if not isinstance(error, ApiError):
            code = "not_found" if error.status_code == 404 else "invalid_request"
            message = f"{error.detail}: {request.method} {request.url.path}"
            error = ApiError(error.status_code, message, code=code)
        if request.url.path == GENERATIONS:
            metrics.count(error.code)
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = next((str(part) for part in first["loc"][1:] if isinstance(part, str)), None)
        message = f"{param}: {first['msg']}" if param else first["msg"]
        return await on_http_error(request, ApiError(400, message, code="invalid_request", param=param))

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        return await on_http_error(request, api_error(error))

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }
        return HTMLResponse(page, headers=headers)

    @app.get("/healthz")
    async def healthz() -> Response:
        return PlainTextResponse("ok\n")

    @app.get("/readyz")
    async def readyz() -> Response:
        pipeline()
        return PlainTextResponse("ok\n")

    @app.get("/metrics", include_in_schema=False)
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model(name, created, pipeline(), limits)]}

    @app.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> dict[str, Any]:
        _check_model(model_id, name)
        return model(name, created, pipeline(), limits)

    @app.post(GENERATIONS)
    async def generate(generation: Generation, http: Request) -> Response:
        _check_model(generation.model, name)
        painter = pipeline()
        asked = generation.request(limits, painter)
        try:
            listener = Listener(asked, worker, http=http, timeout=limits.timeout_seconds, metrics=metrics)
        except DeployError as error:
            raise api_error(error) from error
        if generation.stream:
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            events = _stream(listener, painter.bundle.manifest)
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        try:
            pictures = [event async for event in listener.events() if isinstance(event, Picture)]
        except ApiError as error:  # counted when the job ended, and not once more
            return answer(error)
        return JSONResponse(images(pictures, painter.bundle.manifest))

    return app


async def _stream(listener: Listener, manifest: Manifest) -> AsyncIterator[bytes]:
    """Server-sent events: the place in the line, each step, each picture; an error in place of what lacks."""
    yield _sent({"type": "image_generation.queued", "position": listener.position})
    try:
        async for event in listener.events():
            match event:
                case Step():
                    yield _sent(progress(event))
                case Picture():
                    yield _sent(completed(event, manifest))
                case None:
                    yield b": still here\n\n"
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield _sent(error.body, event="error")


def _check_model(asked: str | None, name: str) -> None:
    if asked is not None and asked != name:
        message = f"There is no model {asked!r} here; there is {name!r}."
        raise ApiError(404, message, code="model_not_found", param="model")


def _sent(data: dict[str, Any], event: str | None = None) -> bytes:
    name = event or data["type"]
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def _page() -> tuple[str, str]:
    """Return the page and the policy under which nothing runs but what is in it."""
    page = (files("deploy") / "page.html").read_text(encoding="utf-8")

    def hashes(tag: str) -> str:
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()}'"
            for block in blocks
        )

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return page, policy
