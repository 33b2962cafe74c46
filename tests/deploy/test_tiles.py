from __future__ import annotations

import numpy as np
import pytest

from deploy.memory import TILE
from deploy.tiles import OVERLAP, decode_tiled

FACTOR = 2


def enlarge(latents: np.ndarray) -> np.ndarray:
    """Every pixel is its latent: a decoder that looks at no neighbourhood."""
    return latents.repeat(FACTOR, axis=1).repeat(FACTOR, axis=2)


@pytest.mark.parametrize(
    ("height", "width"), [(129, 128), (128, 160), (64, 200), (224, 225), (256, 144), (300, 512)]
)
def test_tiles_make_the_picture_of_one_pass(height: int, width: int) -> None:
    latents = np.random.default_rng(0).standard_normal((3, height, width), np.float32)
    sizes = set()

    def decode(tile: np.ndarray) -> np.ndarray:
        sizes.add(tile.shape)
        return enlarge(tile)

    np.testing.assert_allclose(decode_tiled(decode, latents, FACTOR), enlarge(latents), rtol=1e-6, atol=1e-6)
    assert sizes == {(3, min(height, TILE), min(width, TILE))}
    sizes.clear()
    found = decode_tiled(decode, latents, FACTOR, TILE // 2)
    np.testing.assert_allclose(found, enlarge(latents), rtol=1e-6, atol=1e-6)
    assert sizes == {(3, 64, 64)}


def test_neighbouring_tiles_fade_linearly_into_each_other() -> None:
    size = 2 * TILE - OVERLAP
    values = iter([0.0, 1.0])

    def decode(tile: np.ndarray) -> np.ndarray:
        return np.full_like(enlarge(tile), next(values))

    row = decode_tiled(decode, np.zeros((3, 1, size), np.float32), FACTOR)[0, 0]
    alone, shared = (TILE - OVERLAP) * FACTOR, OVERLAP * FACTOR
    assert (row[:alone] == 0).all()
    assert (row[-alone:] == 1).all()
    np.testing.assert_allclose(row[alone:-alone], (np.arange(shared) + 0.5) / shared, atol=1e-6)


def test_no_seam_is_left_where_tiles_differ() -> None:
    def decode(tile: np.ndarray) -> np.ndarray:
        return np.full_like(enlarge(tile), tile.mean())

    ramp = np.broadcast_to(np.linspace(0, 1, 400, dtype=np.float32), (3, 200, 400))
    picture = decode_tiled(decode, ramp, FACTOR)
    assert max(np.abs(np.diff(picture, axis=axis)).max() for axis in (1, 2)) < 1.5 / (OVERLAP * FACTOR)
