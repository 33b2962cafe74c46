"""OpenAI's images API as data: what may be asked, what is answered, and how errors look."""

from __future__ import annotations

import base64
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deploy.bundle import Manifest
from deploy.errors import DeployError, extra
from deploy.pipeline import EdgePipeline
from deploy.queue import Picture, QueueFull, Request, Step, Stopping

with extra("serve"):
    from fastapi import HTTPException
    from fastapi.responses import JSONResponse
    from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "GENERATIONS",
    "ApiError",
    "Disconnected",
    "Generation",
    "Limits",
    "TimedOut",
    "answer",
    "api_error",
    "completed",
    "images",
    "model",
    "progress",
]

GENERATIONS = "/v1/images/generations"

_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
_SEEDS = 2**31
"""Seeds that are drawn: such as any client can hold as a number."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may ask for, and how long it waits."""

    queue: int = 16
    """Requests that wait, besides the one being painted."""
    timeout_seconds: float = 300.0
    """From when a request is taken to its last picture."""
    grace_seconds: float = 30.0
    """What a picture being painted is given to be finished when the server is told to stop."""
    images: int = 4
    """Pictures of one request."""
    steps: int = 100
    side: int | None = None
    """Largest height and width in pixels; None is what the model can make."""
    prompt_characters: int = 4000
    """Of the prompt, and of the negative prompt."""
    body_bytes: int = 1 << 18

    def __post_init__(self) -> None:
        """Refuse limits under which nothing could be painted."""
        for name, value in vars(self).items():
            least = 0 if name in ("queue", "grace_seconds") else 1
            if value is not None and not value >= least:
                raise DeployError(f"The limit {name} must be {least} at least, not {value}.")


class TimedOut(DeployError):
    """A request was not done within the time a request has."""


class Disconnected(DeployError):
    """The client went away."""


class ApiError(HTTPException):
    """An answer that is an error, in the shape that OpenAI's clients read."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        kind = "invalid_request_error" if status < 500 else "server_error"
        if status == 429:
            kind = "rate_limit_error"
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if code in ("model_failed", "timeout"):
            headers["x-should-retry"] = "false"  # OpenAI's clients would, and it would end the same way
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.code = code
        super().__init__(status, message, headers)


def api_error(error: Exception) -> ApiError:
    """Say to a client why there is no picture."""
    match error:
        case ApiError():
            return error
        case QueueFull():
            return ApiError(429, str(error), code="queue_full", retry_after=error.retry_after)
        case Stopping():
            return ApiError(503, str(error), code="stopping", retry_after=10)
        case TimedOut():
            return ApiError(504, str(error), code="timeout")
        case Disconnected():
            return ApiError(499, str(error), code="disconnected")
        case DeployError():
            return ApiError(500, str(error), code="model_failed")
    return ApiError(500, "The picture failed; the server's log says why.", code="model_failed")


def answer(error: ApiError) -> JSONResponse:
    """Return the answer that is this error."""
    return JSONResponse(error.body, status_code=error.status_code, headers=dict(error.headers or {}))


class Generation(BaseModel):
    """The body of `POST /v1/images/generations`.

    Of what changes the picture at OpenAI and cannot here, only the value that changes nothing is taken.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str
    model: str | None = None
    n: int | None = Field(default=None, ge=1)
    size: str | None = None
    response_format: Literal["b64_json"] | None = None
    stream: bool | None = None
    user: str | None = None
    background: Literal["auto", "opaque"] | None = None
    output_format: Literal["png"] | None = None
    partial_images: Literal[0] | None = None
    quality: Literal["auto", "standard"] | None = None
    # Not OpenAI's; its clients send them as `extra_body`.
    negative_prompt: str | None = None
    steps: int | None = Field(default=None, ge=1)
    guidance_scale: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=0, lt=2**63)

    def request(self, limits: Limits, pipeline: EdgePipeline) -> Request:
        """Return what the model is to do.

        Raises:
            ApiError: More is asked for than the server gives, or than the model can.
        """
        for name, asked, most in (
            ("n", self.n, limits.images),
            ("steps", self.steps, limits.steps),
            ("prompt", len(self.prompt), limits.prompt_characters),
            ("negative_prompt", len(self.negative_prompt or ""), limits.prompt_characters),
        ):
            if asked is not None and asked > most:
                unit = " characters" if "prompt" in name else ""
                raise _invalid(name, f"{name} may be {most}{unit} at most here, not {asked}.")
        width, height = self._size() or auto_size(limits, pipeline)
        if limits.side is not None and max(width, height) > limits.side:
            raise _invalid("size", f"size may be {limits.side}x{limits.side} at most here, not {self.size}.")
        try:
            pipeline.check(
                self.negative_prompt or "", guidance_scale=self.guidance_scale, height=height, width=width
            )
        except DeployError as error:
            raise _invalid(None, str(error)) from error
        return Request(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt or "",
            num_images=self.n or 1,
            steps=self.steps or auto_steps(limits, pipeline),
            guidance_scale=self.guidance_scale,
            height=height,
            width=width,
            seed=secrets.randbelow(_SEEDS) if self.seed is None else self.seed,
        )

    def _size(self) -> tuple[int, int] | None:
        """Return width and height; None leaves them to the server."""
        if self.size is None or self.size == "auto":
            return None
        match = _SIZE.fullmatch(self.size)
        if match is None:
            raise _invalid("size", f'size must be WIDTHxHEIGHT in pixels, or "auto", not {self.size!r}.')
        return int(match[1]), int(match[2])


def auto_size(limits: Limits, pipeline: EdgePipeline) -> tuple[int, int]:
    """Return the width and height of a picture whose size nobody asked for."""
    defaults, unit = pipeline.bundle.manifest.defaults, pipeline.size_unit
    most = pipeline.largest_size if limits.side is None else max(unit, limits.side // unit * unit)
    return min(defaults.width, most), min(defaults.height, most)


def auto_steps(limits: Limits, pipeline: EdgePipeline) -> int:
    """Return the steps of a picture for which nobody asked for a number."""
    return min(pipeline.bundle.manifest.defaults.num_inference_steps, limits.steps)


def model(name: str, created: int, pipeline: EdgePipeline, limits: Limits) -> dict[str, Any]:
    """Describe the model as `/v1/models` does, and below `hptool` what may be asked of it."""
    manifest = pipeline.bundle.manifest
    architecture, defaults = manifest.architecture, manifest.defaults
    largest = pipeline.largest_size
    width, height = auto_size(limits, pipeline)
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "hptool",
        "hptool": {
            "target": pipeline.variant.target,
            "size": f"{width}x{height}",
            "size_unit": pipeline.size_unit,
            "largest_size": largest if limits.side is None else min(largest, limits.side),
            "steps": auto_steps(limits, pipeline),
            "guidance_scale": defaults.guidance_scale,
            "guided": architecture.classifier_free or architecture.guidance_embeds,
            "negative_prompt": architecture.classifier_free,
            "most_images": limits.images,
            "most_steps": limits.steps,
            "most_prompt_characters": limits.prompt_characters,
        },
    }


def images(pictures: Sequence[Picture], manifest: Manifest) -> dict[str, Any]:
    """Answer a request that was not streamed."""
    return {
        "created": int(time.time()),
        "data": [
            {
                "b64_json": _base64(picture),
                "seed": picture.seed,
                "seconds": picture.seconds,
            }
            for picture in pictures
        ],
        "size": _size_text(pictures[0]),
        "output_format": "png",
        "background": "opaque",
        "usage": _usage(pictures, manifest),
    }


def progress(step: Step) -> dict[str, Any]:
    """The event of a step; OpenAI has none, and its clients pass it on as it is."""
    return {
        "type": "image_generation.progress",
        "image_index": step.picture,
        "step": step.step,
        "steps": step.steps,
    }


def completed(picture: Picture, manifest: Manifest) -> dict[str, Any]:
    """The event of a picture."""
    return {
        "type": "image_generation.completed",
        "created_at": int(time.time()),
        "image_index": picture.picture,
        "b64_json": _base64(picture),
        "seed": picture.seed,
        "seconds": picture.seconds,
        "size": _size_text(picture),
        "output_format": "png",
        "background": "opaque",
        "quality": "auto",
        "usage": _usage([picture], manifest),
    }


def _invalid(param: str | None, message: str) -> ApiError:
    return ApiError(400, message, code="invalid_request", param=param)


def _base64(picture: Picture) -> str:
    return base64.b64encode(picture.png).decode("ascii")


def _size_text(picture: Picture) -> str:
    width, height = picture.size
    return f"{width}x{height}"


def _usage(pictures: Sequence[Picture], manifest: Manifest) -> dict[str, Any]:
    """Count the tokens that the transformer sees: of text a fixed number, of pictures by their size."""
    architecture = manifest.architecture
    text = manifest.defaults.max_sequence_length
    if architecture.family == "sd3":  # CLIP's tokens stand before T5's
        text += manifest.tokenizers["tokenizer"].max_length
    side = architecture.vae_scale_factor * architecture.patch_size
    image = sum((picture.size[0] // side) * (picture.size[1] // side) for picture in pictures)
    text *= len(pictures)
    return {
        "input_tokens": text,
        "input_tokens_details": {"text_tokens": text, "image_tokens": 0},
        "output_tokens": image,
        "total_tokens": text + image,
    }
