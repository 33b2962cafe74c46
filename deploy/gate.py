"""Who is let in: the token, the names this machine answers to, a place in the line, and how much is read."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
from collections.abc import Callable
from pathlib import Path

from deploy.errors import DeployError, extra
from deploy.images_api import GENERATIONS, ApiError, answer, api_error

with extra("serve"):
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["TOKEN_VARIABLE", "Gate", "is_loopback", "read_token"]

TOKEN_VARIABLE = "HPTOOL_TOKEN"
_OPEN_PATHS = {"/", "/healthz", "/readyz"}
"""What is answered without a token: it says nothing of what was painted, and paints nothing."""


class Gate:
    """Lets a request in if it has the token and a body of a size that is read."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        local: bool,
        body_bytes: int,
        check_place: Callable[[], None],
        on_refusal: Callable[[str], None],
    ) -> None:
        """Wrap an app.

        Args:
            local: Whether to answer only to this machine's own names, where there is no token.
            check_place: Raises when no request for pictures can be taken now, whatever it asks for.
            on_refusal: Called with the code of the error when a request for pictures is refused.
        """
        self._app, self._body_bytes = app, body_bytes
        self._check_place, self._on_refusal = check_place, on_refusal
        self._token = None if token is None else _digest(token.encode())
        self._local = local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refusal = None if scope["path"] in _OPEN_PATHS else self._refusal(headers)
        if refusal is None and scope["path"] == GENERATIONS:
            refusal = self._no_place()
        if refusal is not None:
            if scope["path"] == GENERATIONS:
                self._on_refusal(refusal.code)
            await answer(refusal)(scope, receive, send)
            return
        received = 0

        async def receive_some() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._body_bytes:
                raise self._too_large()
            return message

        await self._app(scope, receive_some, send)

    def _refusal(self, headers: dict[bytes, bytes]) -> ApiError | None:
        if self._token is not None:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(_digest(given.strip()), self._token):
                message = "The bearer token is missing or wrong. Send it as `Authorization: Bearer TOKEN`."
                return ApiError(401, message, code="invalid_api_key")
        elif self._local and not is_loopback(_host_name(headers.get(b"host", b"").decode("latin-1"))):
            # Any site a user visits could have its name point here, and then ask for pictures.
            message = "Without a token this server answers only to names of its own machine, as localhost."
            return ApiError(403, message, code="wrong_host")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._body_bytes:
            return self._too_large()
        return None

    def _no_place(self) -> ApiError | None:
        # Before the body is parsed: of a flood, most are refused, and others wait while that is done.
        try:
            self._check_place()
        except DeployError as error:
            return api_error(error)
        return None

    def _too_large(self) -> ApiError:
        message = f"The body of a request may have {self._body_bytes} bytes at most."
        return ApiError(413, message, code="request_too_large")


def read_token(path: Path | None) -> str | None:
    """Return the token of a file, or of the environment; None where neither is given.

    Raises:
        DeployError: The file cannot be read, or there is no token in it.
    """
    if path is not None:
        try:
            token = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise DeployError(f"The token in {path} cannot be read: {error}.") from error
        source = str(path)
    elif TOKEN_VARIABLE in os.environ:
        token, source = os.environ[TOKEN_VARIABLE].strip(), TOKEN_VARIABLE
    else:
        return None
    if not re.fullmatch(r"[!-~]{16,}", token):
        raise DeployError(
            f"The token in {source} must be one word of 16 ASCII characters at least. "
            "Make one with: openssl rand -hex 32"
        )
    return token


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _host_name(header: str) -> str:
    """Return the host of a Host header, without its port."""
    return header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0]
