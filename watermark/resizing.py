"""Brings a reference picture to the size of the picture that is drawn from it."""

from enum import StrEnum

import numpy as np
from PIL import Image, ImageOps


class Fit(StrEnum):
    """What happens to a picture of other proportions."""

    COVER = "cover"  # what sticks out on two sides is cut off
    CONTAIN = "contain"  # all of it is there, in the middle of what its edges' colours fill up


def fit(image: Image.Image, size: tuple[int, int], how: Fit) -> Image.Image:
    """`image`, of mode L, RGB or RGBA, at `size` (width, height) in px."""
    if image.size == size:
        return image
    if how is Fit.COVER:
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    share = min(size[0] / image.width, size[1] / image.height)
    # Of a picture that is a strip, not nothing.
    inside = max(1, round(image.width * share)), max(1, round(image.height * share))
    return _extend_edges(image.resize(inside, Image.Resampling.LANCZOS), size)


def _extend_edges(inside: Image.Image, size: tuple[int, int]) -> Image.Image:
    """`inside` in the middle of `size`; its outermost pixels go on to the rims, as bars would not look."""
    left, top = (size[0] - inside.width) // 2, (size[1] - inside.height) // 2
    right, bottom = size[0] - inside.width - left, size[1] - inside.height - top
    pixels = np.asarray(inside)
    around = [(top, bottom), (left, right), *[(0, 0)] * (pixels.ndim - 2)]
    return Image.fromarray(np.pad(pixels, around, mode="edge"))
