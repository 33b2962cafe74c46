"""Decoding latents in tiles that overlap, so that memory is that of one tile whatever the picture's size.

Shapes: C latent channels, h and w of the latents, H and W of the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

from deploy.errors import extra
from deploy.memory import TILE

with extra("edge"):
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["OVERLAP", "decode_tiled"]

Floats = NDArray[np.float32]

OVERLAP = 32
"""Latents, at least, that neighbouring tiles share."""


def decode_tiled(
    decode: Callable[[Floats], Floats], latents_Chw: Floats, factor: int, size: int = TILE
) -> Floats:
    """Decode latents [C, h, w] tile by tile, each faded linearly into the next.

    A decoder that normalises over all that it sees makes nearly the picture of a single pass; the very same
    comes only from one that looks no further than the neighbourhood of a pixel.

    Args:
        decode: From latents [C, h, w] of one tile to the picture [3, H, W] of it. Tiles have one size.
        factor: Pixels along a side of one latent.
        size: Latents along a side of a tile, at most.

    Returns:
        The picture [3, H, W].
    """
    height, width = latents_Chw.shape[1:]
    tile_height, tile_width = min(height, size), min(width, size)
    rows, columns = _starts(height, size), _starts(width, size)
    row_weights, column_weights = _weights(rows, tile_height, factor), _weights(columns, tile_width, factor)
    picture = np.zeros((3, height * factor, width * factor), np.float32)
    total = np.zeros(picture.shape[1:], np.float32)
    for top, row_weight in zip(rows, row_weights, strict=True):
        for left, column_weight in zip(columns, column_weights, strict=True):
            tile = latents_Chw[:, top : top + tile_height, left : left + tile_width]
            weight = row_weight[:, None] * column_weight
            place = np.s_[
                top * factor : (top + tile_height) * factor, left * factor : (left + tile_width) * factor
            ]
            picture[:, *place] += decode(tile) * weight
            total[place] += weight
    picture /= total
    return picture


def _starts(length: int, size: int) -> list[int]:
    """Return where tiles start along a side, evenly spread, the last ending with the side."""
    if length <= size:
        return [0]
    num_tiles = math.ceil((length - OVERLAP) / (size - OVERLAP))
    return [round(index * (length - size) / (num_tiles - 1)) for index in range(num_tiles)]


def _weights(starts: list[int], size: int, factor: int) -> list[Floats]:
    """Return for each tile the weights of its pixels along a side: rising and falling over what it shares."""
    shared = [0, *((start + size - following) * factor for start, following in pairwise(starts)), 0]
    places = np.arange(size * factor, dtype=np.float32) + 0.5
    weights = []
    for before, behind in pairwise(shared):
        # The edges of the picture have nothing to fade into.
        rising = np.minimum(places / before, 1) if before else np.ones_like(places)
        falling = np.minimum(places[::-1] / behind, 1) if behind else np.ones_like(places)
        weights.append((rising * falling).astype(np.float32))
    return weights
