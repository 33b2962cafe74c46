"""What an export has to trace, traced by a second process from the other end: one alone keeps one core busy.

That process is `python -m export.ahead MODEL PART ... [--half] [--fused]`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from export.denoiser import lower_transformer
from export.encoders import lower_text_encoder, lower_vae_decoder
from toolchain.families import Model, open_model

__all__ = ["traced_ahead"]

_WORTH = 100_000_000
"""Parameters of a transformer: a smaller model is traced before another process has imported all it takes."""


@contextmanager
def traced_ahead(model: Model, parts: Sequence[str], *, half: bool, fused: bool) -> Iterator[None]:
    """Have another process trace parts of a model, and keep the traces for whoever needs them.

    It says nothing and nobody waits for it: what fails there is traced again here, and is told here.

    Args:
        model: On disk.
        parts: Their directories, in the order they are needed; the last is traced first.
        half: Whether the transformer's graph in float16 is wanted beside the one in float32.
        fused: Whether attention is one operator in the latter.
    """
    if len(parts) < 2 or model.num_parameters < _WORTH:
        yield
        return
    options = [name for name, wanted in (("--half", half), ("--fused", fused)) if wanted]
    process = subprocess.Popen(
        [sys.executable, "-m", "export.ahead", str(model.path), *reversed(parts), *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.kill()
        process.wait()


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


if __name__ == "__main__":
    path, *names = (item for item in sys.argv[1:] if not item.startswith("--"))
    opened = open_model(path, precision="none")
    for name in names:
        _trace(opened, name, half="--half" in sys.argv, fused="--fused" in sys.argv)
