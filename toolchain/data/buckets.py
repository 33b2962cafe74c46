"""Which sizes pictures are trained in: each near the model's own area, in the picture's own proportions."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, TypeAlias

from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Size: TypeAlias = tuple[int, int]
"""Height and width."""

MAX_PIXELS = 100_000_000
"""Of a picture's file; what says it has more is no picture, or a trap."""
_FORMATS = ("JPEG", "PNG", "WEBP")
_MOST_STRETCHED = 3.0
"""The longer side over the shorter."""
_STEPS = 16
"""Steps of the grid of sizes that the side of a square takes, where the model's multiples are finer."""


class BrokenPictureError(Exception):
    """Why a file is no picture to learn from."""


def buckets_of(height: int, width: int, *, multiple: int, longest: int) -> tuple[Size, ...]:
    """Sizes of about the area of a model's default size, which comes first.

    Args:
        height: Pixels, as all lengths.
        width: The same.
        multiple: What a model's sides are multiples of.
        longest: The longest side it takes.
    """
    side = math.sqrt(height * width)
    step = max(multiple, round(side / _STEPS / multiple) * multiple)
    found = [(height, width)]
    for short in range(step, int(side) + 1, step):
        # Rounded down, so that no size costs more than the default.
        long = height * width // short // step * step
        if long <= min(longest, _MOST_STRETCHED * short):
            found += [(short, long), (long, short)]
    return tuple(dict.fromkeys(found))


def nearest(buckets: tuple[Size, ...], size: Size) -> Size:
    """The bucket whose proportions a picture's are nearest to; the larger, where two are alike."""

    def distance(bucket: Size) -> tuple[float, int]:
        stretched = math.log(bucket[0] / bucket[1]) - math.log(size[0] / size[1])
        return round(abs(stretched), 6), -bucket[0] * bucket[1]

    return min(buckets, key=distance)


def fitted(picture: bytes, buckets: tuple[Size, ...]) -> npt.NDArray[np.uint8]:
    """Decode a picture and cut it to its bucket, [height, width, 3].

    It is scaled until it covers the bucket, and what is over is cut off at both ends alike. What is
    transparent becomes white.

    Raises:
        BrokenPictureError: It is none.
    """
    import numpy as np

    try:
        with Image.open(io.BytesIO(picture), formats=_FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise BrokenPictureError(f"it has {opened.width}x{opened.height} pixels, too many")
            turned = ImageOps.exif_transpose(opened)
            if turned.has_transparency_data:
                clear = turned.convert("RGBA")
                turned = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
            plain = turned.convert("RGB")
    except (BrokenPictureError, MemoryError):
        raise
    except UnidentifiedImageError as error:  # it names the object in memory
        raise BrokenPictureError(f"its picture is no {', '.join(_FORMATS)}") from error
    # Pillow's decoders raise whatever goes wrong in them.
    except Exception as error:
        raise BrokenPictureError(f"its picture cannot be decoded: {error}") from error
    high, wide = nearest(buckets, (plain.height, plain.width))
    return np.asarray(ImageOps.fit(plain, (wide, high), Image.Resampling.LANCZOS))
