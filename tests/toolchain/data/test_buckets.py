"""Pictures keep their proportions as nearly as a model's sizes allow."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from tests.toolchain.data.conftest import picture
from toolchain.data import buckets as module
from toolchain.data.buckets import BrokenPictureError, buckets_of, fitted, nearest

TINY = buckets_of(64, 64, multiple=16, longest=128)


def test_sizes_are_multiples_of_no_more_than_the_default_area() -> None:
    found = buckets_of(1024, 1024, multiple=16, longest=1536)
    assert found[0] == (1024, 1024)
    assert len(found) == len(set(found)) == 11
    for height, width in found:
        assert height % 64 == width % 64 == 0
        assert 0.9 * 1024**2 < height * width <= 1024**2
        assert max(height, width) <= 1536
        assert (width, height) in found
    assert (832, 1216) in found
    assert TINY == ((64, 64), (48, 80), (80, 48))


def test_a_model_that_knows_one_size_has_one_bucket() -> None:
    assert buckets_of(64, 64, multiple=16, longest=64) == ((64, 64),)


def test_a_picture_goes_where_its_proportions_are_nearest() -> None:
    assert nearest(TINY, (10, 10)) == nearest(TINY, (100, 110)) == (64, 64)
    assert nearest(TINY, (100, 150)) == nearest(TINY, (1, 1000)) == (48, 80)
    assert nearest(TINY, (150, 100)) == (80, 48)


def test_a_picture_is_cut_and_not_squashed() -> None:
    """Of three stripes of 64 pixels, 192x64 in all, the middle one is the square."""
    image = Image.new("RGB", (192, 64), "red")
    image.paste("blue", (64, 0, 128, 64))
    file = io.BytesIO()
    image.save(file, "PNG")
    cut = fitted(file.getvalue(), ((64, 64),))
    assert cut.shape == (64, 64, 3)
    assert (cut == (0, 0, 255)).all()


def test_a_small_picture_is_enlarged_to_its_bucket() -> None:
    assert fitted(picture("red", (4, 4)), TINY).shape == (64, 64, 3)


def test_transparency_is_white_and_grey_has_colours() -> None:
    for image, expected in (
        (Image.new("RGBA", (8, 8), (9, 9, 9, 0)), 255),
        (Image.new("LA", (8, 8), (9, 0)), 255),
        (Image.new("L", (8, 8), 77), 77),
    ):
        file = io.BytesIO()
        image.save(file, "PNG")
        assert np.unique(fitted(file.getvalue(), TINY)).tolist() == [expected]


def test_a_picture_is_turned_as_its_camera_was() -> None:
    file = io.BytesIO()
    image = Image.new("RGB", (80, 48))
    image.getexif()[0x0112] = 6  # a quarter turn
    image.save(file, "JPEG", exif=image.getexif())
    assert fitted(file.getvalue(), TINY).shape == (80, 48, 3)


def test_what_is_no_picture_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    bitmap = picture(format="BMP")
    for data, reason in (
        (b"", "is no JPEG, PNG, WEBP"),
        (b"junk", "is no JPEG, PNG, WEBP"),
        (bitmap, "is no JPEG, PNG, WEBP"),
        (picture(size=(64, 64), format="JPEG")[:300], "cannot be decoded"),
        (picture(size=(64, 64))[:60], "cannot be decoded"),
    ):
        with pytest.raises(BrokenPictureError, match=reason):
            fitted(data, TINY)
    monkeypatch.setattr(module, "MAX_PIXELS", 63)
    with pytest.raises(BrokenPictureError, match="8x8 pixels, too many"):
        fitted(picture(), TINY)
