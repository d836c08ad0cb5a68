"""Locate a product in an uploaded composite. Pure."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from watermark.geometry import Rect
from watermark.product.cutout import resize_premultiplied

# Longer side, in px, of the reduced copy for the coarse search; the fine search goes px by px around its result.
COARSE_PX = 256
# Number of the product's opaque pixels compared at each offset of the fine search.
NUM_SAMPLES = 4000
# Mean difference of those pixels, in grey levels, above which it is not the product.
MAX_DIFFERENCE = 16.0
OPAQUE = 250


def match_template(composite: Image.Image, product: Image.Image, size: tuple[int, int]) -> Rect | None:
    """Return the rectangle of the RGBA `product` at `size` in an RGB `composite`; None where it is not found.

    Masked template matching: the least squared difference over the opaque pixels, by Fourier transforms on a reduced
    copy of the whole image, then px by px around the best offset.
    """
    factor = max(1.0, max(composite.size) / COARSE_PX)
    placed = resize_premultiplied(product, size)
    near_left, near_top = (round(one * factor) for one in _coarse_place(composite, placed, factor))
    reach = int(np.ceil(factor)) + 1
    pixels = np.asarray(placed)
    rows, columns = np.nonzero(pixels[..., 3] >= OPAQUE)
    if not len(rows):
        return None

    # Evenly sampled: about NUM_SAMPLES pixels.
    every = max(1, len(rows) // NUM_SAMPLES)
    rows, columns = rows[::every], columns[::every]
    colours = pixels[rows, columns, :3].astype(np.int16)
    image = np.asarray(composite)
    places = [
        (float(np.abs(image[rows + top, columns + left] - colours).mean()), left, top)
        for top in _offsets_near(near_top, reach, composite.height - size[1])
        for left in _offsets_near(near_left, reach, composite.width - size[0])
    ]
    difference, left, top = min(places)
    return Rect(left, top, left + size[0], top + size[1]) if difference <= MAX_DIFFERENCE else None


def _offsets_near(near: int, reach: int, last: int) -> range:
    near = min(max(near, 0), last)
    return range(max(0, near - reach), min(last, near + reach) + 1)


def _coarse_place(composite: Image.Image, placed: Image.Image, factor: float) -> tuple[int, int]:
    """Return the best left and top in a copy that is `factor` times smaller."""
    width, height = (max(1, round(side / factor)) for side in composite.size)
    small = np.asarray(composite.resize((width, height), Image.Resampling.BOX), dtype=np.float64)
    across, down = (
        min(whole, max(1, round(side / factor))) for whole, side in zip((width, height), placed.size, strict=True)
    )
    template = np.asarray(resize_premultiplied(placed, (across, down)), dtype=np.float64)
    mask = template[..., 3:] / 255

    # The template's own sum of squares is the same everywhere.
    difference = _correlate(small**2, np.broadcast_to(mask, (down, across, 3)))
    difference -= 2 * _correlate(small, mask * template[..., :3])
    best = np.argmin(difference[: height - down + 1, : width - across + 1])
    top, left = divmod(int(best), width - across + 1)
    return left, top


def _correlate(image: NDArray[np.float64], kernel: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the circular cross-correlation of `image` with `kernel`, summed over channels."""
    shape = image.shape[:2]
    product = np.fft.rfft2(image, axes=(0, 1)) * np.fft.rfft2(kernel, shape, axes=(0, 1)).conj()
    correlated: NDArray[np.float64] = np.fft.irfft2(product.sum(axis=-1), shape, axes=(0, 1))
    return correlated
