"""Resize a reference image to the size of the generated image."""

from enum import StrEnum

import numpy as np
from PIL import Image, ImageOps


class Fit(StrEnum):
    """What happens to a picture of other proportions."""

    COVER = "cover"  # crop the overhang on two sides
    CONTAIN = "contain"  # keep all of it, centred; its edge pixels are extended to the borders


def fit(image: Image.Image, size: tuple[int, int], how: Fit) -> Image.Image:
    """Resize `image`, of mode L, RGB or RGBA, to `size` (width, height) in px."""
    if image.size == size:
        return image
    if how is Fit.COVER:
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    share = min(size[0] / image.width, size[1] / image.height)
    # At least one px, for strips.
    width, height = max(1, round(image.width * share)), max(1, round(image.height * share))
    pixels = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    right, bottom = size[0] - width - left, size[1] - height - top
    # Edge pixels instead of bars.
    around = [(top, bottom), (left, right), *[(0, 0)] * (pixels.ndim - 2)]
    return Image.fromarray(np.pad(pixels, around, mode="edge"))
