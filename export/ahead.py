"""What an export has to trace, traced by a second process from the other end: one alone takes one core."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_int

from export.denoiser import lower_transformer
from export.encoders import lower_text_encoder, lower_vae_decoder
from toolchain.families import Model

__all__ = ["traced_ahead"]

_WORTH = 100_000_000
"""Parameters of a transformer: a smaller model is traced almost before another process has begun."""
_NOTHING = -1
_MOMENT = 0.05
"""Seconds between looks at what the other process is at."""
_PATIENCE = 120
"""Seconds a part is waited for: what was forked beside threads can hang, and is given up then."""


@contextmanager
def traced_ahead(
    model: Model, parts: Sequence[str], *, half: bool, fused: bool
) -> Iterator[Callable[[str], None]]:
    """Have another process trace parts of a model, and keep the traces for whoever needs them.

    What this gives is told of each part that is begun here. The other process ends where it meets one, and a
    part that it is at is waited for, since two would not be done before one is.

    It says nothing: what fails there is traced again here, and is told here. It is forked, since importing
    all that it takes would keep it from the half of its work.

    Args:
        model: On disk.
        parts: Their directories, in the order they are needed; the last is traced first.
        half: Whether the transformer's graph in float16 is wanted beside the one in float32.
        fused: Whether attention is one operator in the latter.
    """
    if len(parts) < 2 or model.num_parameters < _WORTH:
        yield lambda _: None
        return
    context = multiprocessing.get_context("fork")
    # Without locks, which a process that is killed would keep.
    begun, tracing = context.RawValue("i", 0), context.RawValue("i", _NOTHING)
    process = context.Process(
        target=_trace_all, args=(model, parts, begun, tracing, half, fused), daemon=True
    )
    process.start()

    def begin(part: str) -> None:
        if part not in parts:
            return
        index = parts.index(part)
        begun.value = index + 1
        given_up = time.monotonic() + _PATIENCE
        while tracing.value == index and process.is_alive():
            if time.monotonic() > given_up:
                process.kill()
            process.join(_MOMENT)

    try:
        yield begin
    finally:
        process.kill()
        process.join()


def _trace_all(
    model: Model,
    parts: Sequence[str],
    begun: c_int,
    tracing: c_int,
    half: bool,
    fused: bool,
) -> None:
    gc.freeze()  # the threads of sessions that lie in the garbage are not here to be ended
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    for index in reversed(range(len(parts))):
        tracing.value = index  # said before it is asked, or each could begin it unseen by the other
        if index < begun.value:
            break
        _trace(model, parts[index], half=half, fused=fused)
    tracing.value = _NOTHING


def _trace(model: Model, part: str, *, half: bool, fused: bool) -> None:
    weights = model.weights(part)
    if part == "transformer":
        lower_transformer(model.mmdit, weights, fused_attention=fused)
        if half:
            lower_transformer(model.mmdit, weights, "float16")
    elif part == "vae":
        lower_vae_decoder(model.pipeline.vae, weights)
    else:
        lower_text_encoder(getattr(model.pipeline, part), weights)
