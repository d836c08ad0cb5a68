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
    inside = max(1, round(image.width * share)), max(1, round(image.height * share))
    return _extend_edges(image.resize(inside, Image.Resampling.LANCZOS), size)


def _extend_edges(inside: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Centre `inside` in `size` and extend its edge pixels to the borders, instead of bars."""
    left, top = (size[0] - inside.width) // 2, (size[1] - inside.height) // 2
    right, bottom = size[0] - inside.width - left, size[1] - inside.height - top
    pixels = np.asarray(inside)
    around = [(top, bottom), (left, right), *[(0, 0)] * (pixels.ndim - 2)]
    return Image.fromarray(np.pad(pixels, around, mode="edge"))
