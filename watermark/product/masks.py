"""Keeps a product as it is while the picture around it is drawn over. Pure."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from watermark.geometry import Rect
from watermark.product.cutout import CLEAR, resize_premultiplied

# Half of how far inside its outline a product comes over gradually from the refined picture, as a part of the picture's
# shorter side.
SOFT_EDGE = 0.006
# How far outside it the engine keeps off: a latent's cell, which is black or white as a whole, or a second outline
# would be drawn in those that the product's own runs through.
DISTANCE_PX = 8

_Mask = NDArray[np.bool_]


def product_mask(size: tuple[int, int], product: Image.Image, place: Rect) -> Image.Image:
    """Mode L at the picture's `size`: 255 where the product is, 0 elsewhere."""
    alpha = resize_premultiplied(product, place.size).getchannel("A")
    mask = Image.new("L", size)
    mask.paste(alpha.point([0] * CLEAR + [255] * (256 - CLEAR)), place[:2])
    return mask


def repaint_mask(mask: Image.Image) -> Image.Image:
    """What an engine may repaint, mode L: white, but for the product and a little around it."""
    return _image(_eroded(np.asarray(mask) == 0, DISTANCE_PX))


def erode(mask: Image.Image) -> Image.Image:
    """The part of the product's mask in which no pixel changes."""
    return _image(_eroded(np.asarray(mask) > 0, 2 * _radius(mask)))


def restore_masked(refined: Image.Image, composite: Image.Image, mask: Image.Image) -> Image.Image:
    """`refined` with the product of `composite`: to the byte inside the eroded mask, gradually towards its outline."""
    radius = _radius(mask)
    core = _image(_eroded(np.asarray(mask) > 0, radius))
    # The blur's window has one value inside the eroded mask, and another outside the mask.
    return Image.composite(composite, refined, core.filter(ImageFilter.BoxBlur(radius)))


def _radius(mask: Image.Image) -> int:
    return max(1, round(SOFT_EDGE * min(mask.size)))


def _eroded(inside: _Mask, radius: int) -> _Mask:
    """True where all pixels of the square of `radius` around are; what is outside the picture counts as its rim."""
    for axis in (0, 1):
        padded = np.pad(inside, [(radius, radius) if one == axis else (0, 0) for one in (0, 1)], mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * radius + 1, axis=axis)
        inside = np.logical_and.reduce(windows, axis=-1)
    return inside


def _image(mask: _Mask) -> Image.Image:
    return Image.fromarray(mask.astype(np.uint8) * 255)
