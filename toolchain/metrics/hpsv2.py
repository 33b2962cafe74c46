"""HPSv2: how a person would like the picture, as learned from people's choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from toolchain.metrics import PictureMetric
from toolchain.metrics.clip import Encoder


@dataclass(frozen=True, kw_only=True)
class Hpsv2(PictureMetric):
    """Human Preference Score v2 (arXiv 2306.09341): 100 cos(text, picture) in a fine-tuned CLIP.

    Non-square pictures are cut to their middle square.
    """

    name = "hpsv2"

    directory: Path
    """Of HPSv2's ViT-H-14, as safetensors in the layout of OpenCLIP or transformers, with its tokenizer."""

    def check(self, prompts: Sequence[str]) -> None:
        """Any prompt will do; this reads the model."""
        _ = self._encoder

    def scores(self, prompts: Sequence[str], pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """See `PictureMetric`."""
        return 100 * self._encoder.cosines(prompts, pictures)

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.directory)
