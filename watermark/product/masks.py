"""Masks that keep a product's pixels while the image around it is repainted. Pure."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from watermark.geometry import Rect
from watermark.product.cutout import CLEAR, resize_premultiplied

# Half the width of the blend inside the product's outline, as a fraction of the image's shorter side.
SOFT_EDGE = 0.006
# Distance outside the outline that is not repainted: one latent cell, which is masked as a whole. Without it, a second
# outline would appear in the cells that the product's own crosses.
DISTANCE_PX = 8


def product_mask(size: tuple[int, int], product: Image.Image, place: Rect) -> Image.Image:
    """Return the product's mask, mode L at the image's `size`: 255 on the product, 0 elsewhere."""
    alpha = resize_premultiplied(product, place.size).getchannel("A")
    mask = Image.new("L", size)
    mask.paste(alpha.point([0] * CLEAR + [255] * (256 - CLEAR)), place[:2])
    return mask


def repaint_mask(mask: Image.Image) -> Image.Image:
    """Return the inpainting mask, mode L: white except for the product and `DISTANCE_PX` around it."""
    return _eroded(np.asarray(mask) == 0, DISTANCE_PX)


def restore_masked(refined: Image.Image, composite: Image.Image, mask: Image.Image) -> Image.Image:
    """Restore `composite` in `refined` under `mask`: exact inside the eroded mask, blended towards its outline."""
    radius = max(1, round(SOFT_EDGE * min(mask.size)))
    core = _eroded(np.asarray(mask) > 0, radius)
    # The blur is constant inside the eroded mask, and outside the mask.
    return Image.composite(composite, refined, core.filter(ImageFilter.BoxBlur(radius)))


def _eroded(inside: NDArray[np.bool_], radius: int) -> Image.Image:
    """Return the mask, mode L, of where the whole square of `radius` is True; edge pixels extend the image."""
    for axis in (0, 1):
        padded = np.pad(inside, [(radius, radius) if one == axis else (0, 0) for one in (0, 1)], mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * radius + 1, axis=axis)
        inside = np.logical_and.reduce(windows, axis=-1)
    return Image.fromarray(inside.astype(np.uint8) * 255)
