"""The process behind `hptool serve`: it listens, opens the bundle, and stops when it is told to."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from deploy.bundle import MANIFEST
from deploy.errors import DeployError, extra
from deploy.gate import TOKEN_VARIABLE, is_loopback
from deploy.images_api import Limits
from deploy.pipeline import EdgePipeline
from deploy.queue import Worker
from deploy.web import build_app

with extra("serve"):
    import uvicorn

__all__ = ["ServerOfWorker", "serve"]

logger = logging.getLogger(__name__)

_JOIN_SECONDS = 2.0
_NICER = 5
"""What painting yields to answering: a third of a core's time where both want all of it."""


def serve(
    bundle: Path,
    open_pipeline: Callable[[], EdgePipeline],
    *,
    limits: Limits,
    host: str,
    port: int,
    token: str | None,
    insecure: bool,
    on_listen: Callable[[str], None],
) -> None:
    """Serve a bundle until the process is told to stop by SIGTERM or SIGINT.

    Args:
        open_pipeline: Called in the thread that paints, once the server answers.
        on_listen: Called with the server's address.

    Raises:
        DeployError: The address is not to be had, or is open to others without a token, or the bundle cannot
            be opened.
    """
    if token is None and not insecure and not is_loopback(host):
        raise DeployError(
            f"{host} can be reached by others, and there is no token. Give one with --token-file or "
            f"{TOKEN_VARIABLE}, or say --insecure if everyone who can reach this machine may use it."
        )
    if not (bundle / MANIFEST).is_file():
        raise DeployError(f"{bundle} has no {MANIFEST}: give the directory that `hptool export` wrote.")
    worker = Worker(_loaded(open_pipeline), size=limits.queue)
    listening = _listen(host, port)
    app = build_app(
        worker,
        name=bundle.resolve().name,
        created=int((bundle / MANIFEST).stat().st_mtime),
        limits=limits,
        token=token,
        local=not insecure,
    )
    # What is being painted is refused after the grace, so that nothing is left for uvicorn to break off.
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=int(limits.grace_seconds) + 5,
    )
    server = ServerOfWorker(config, worker, limits.grace_seconds)
    worker.opened.add_done_callback(lambda opened: server.stop_if(opened.exception() is not None))
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn has handlers of its own while it runs, and raises the signal once more after it.
        signal.signal(number, lambda *_: server.stop_if(True))
    shown = f"[{host}]" if ":" in host else host
    on_listen(f"http://{shown}:{listening.getsockname()[1]}")
    worker.start()
    server.run(sockets=[listening])
    if worker.opened.done() and (error := worker.opened.exception()) is not None:
        raise error
    if not worker.join(_JOIN_SECONDS):
        # A step, or the opening of a model, cannot be stopped from outside, and the interpreter must not
        # be taken down around it.
        logger.info("Stopped in the middle of a step.")
        logging.shutdown()
        os._exit(0)


class ServerOfWorker(uvicorn.Server):
    """Refuses what waits before it waits for what is being answered."""

    def __init__(self, config: uvicorn.Config, worker: Worker[EdgePipeline], grace: float) -> None:
        """Take a worker to drain when the server stops, with so many seconds for what it paints."""
        super().__init__(config)
        self._worker, self._grace = worker, grace

    def stop_if(self, failed: bool) -> None:
        """Stop as a signal makes it stop."""
        if failed:
            self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain the worker, then close connections as they are answered."""
        self._worker.drain(self._grace)
        await super().shutdown(sockets)


def _loaded(open_pipeline: Callable[[], EdgePipeline]) -> Callable[[], EdgePipeline]:
    def load() -> EdgePipeline:
        if sys.platform == "linux":  # elsewhere threads have no such number of their own
            thread = threading.get_native_id()  # those that a runtime starts from it inherit the number
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICER)
        start = time.perf_counter()
        pipeline = open_pipeline()
        pipeline.load()
        logger.info("The model is open, after %.1f s.", time.perf_counter() - start)
        return pipeline

    return load


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise DeployError(f"Cannot listen on {host} port {port}: {error}.") from error
