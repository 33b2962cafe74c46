"""What an export has to trace, traced by a second process from the other end: one alone takes one core."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from export.components import GraphKind
from export.denoiser import trace_backwards
from export.encoders import lower_text_encoder, lower_vae_decoder
from toolchain.families import Model

__all__ = ["traced_ahead"]

_WORTH = 100_000_000
"""Parameters of a transformer: a smaller model is traced almost before another process has begun."""


@contextmanager
def traced_ahead(model: Model, parts: Sequence[str], graphs: Sequence[GraphKind]) -> Iterator[None]:
    """Have another process trace parts of a model, and keep the traces for whoever needs them.

    The two meet at a trace that one of them is at, for which the other waits. It says nothing: what fails
    there is traced again here, and is told here. It is forked, since importing all that it takes would keep
    it from the half of its work.

    Args:
        model: On disk.
        parts: Their directories, in the order they are needed; the last is traced first.
        graphs: What is wanted of the transformer.
    """
    if not parts or model.num_parameters < _WORTH:
        yield
        return
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_trace_all, args=(model, parts, graphs), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _trace_all(model: Model, parts: Sequence[str], graphs: Sequence[GraphKind]) -> None:
    gc.freeze()  # the threads of sessions that lie in the garbage are not here to be ended
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    for part in reversed(parts):
        weights = model.weights(part)
        if part == "transformer":
            for graph in reversed(graphs):
                trace_backwards(model.mmdit, weights, graph.activations, fused=graph.fused)
        elif part == "vae":
            lower_vae_decoder(model.pipeline.vae, weights)
        else:
            lower_text_encoder(getattr(model.pipeline, part), weights)
