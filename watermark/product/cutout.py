"""Check, trim and resize a cut-out product. Pure: images in, images out."""

import numpy as np
from PIL import Image

# Alpha that is nowhere below this is no cut-out: cameras and editors write opaque alpha into every file.
CLEAR = 128
# Fainter pixels are mask noise, ignored in the product's bounds.
VISIBLE = 16
# Fractions of an image's pixels: below, the model found no product; above, it removed no background.
MIN_PART, MAX_PART = 0.001, 0.99
# No image is generated larger, so no product needs more.
MAX_SIDE_PX = 2048


class CutoutFailed(Exception):
    """No product in the image, or no background to remove; the message says which."""


def has_transparency(image: Image.Image) -> bool:
    """Return whether some part of an RGBA image is transparent."""
    return bool(np.asarray(image.getchannel("A")).min() < CLEAR)


def trim(image: Image.Image) -> Image.Image:
    """Crop the RGBA image to its visible pixels. Raises `CutoutFailed` where there are none."""
    bounds = image.getchannel("A").point([0] * VISIBLE + [255] * (256 - VISIBLE)).getbbox()
    if bounds is None:
        raise CutoutFailed("all of it is transparent")
    return limit_size(image.crop(bounds))


def limit_size(image: Image.Image) -> Image.Image:
    """Downscale an RGB or RGBA image whose longer side exceeds `MAX_SIDE_PX`."""
    share = MAX_SIDE_PX / max(image.size)
    if share >= 1:
        return image
    return resize_premultiplied(image, (max(1, round(image.width * share)), max(1, round(image.height * share))))


def resize_premultiplied(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize an RGB or RGBA image; premultiplied, or colours of transparent pixels would bleed into the edges."""
    if image.size == size:
        return image
    if image.mode != "RGBA":
        return image.resize(size, Image.Resampling.LANCZOS)
    return image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")


def check_cutout(image: Image.Image) -> Image.Image:
    """Trim a model's RGBA cut-out of a whole image. Raises `CutoutFailed` where it found or removed nothing."""
    part = float((np.asarray(image.getchannel("A")) >= CLEAR).mean())
    if part < MIN_PART:
        raise CutoutFailed("no product was found in it")
    if part > MAX_PART:
        raise CutoutFailed("nothing was found around the product")
    return trim(image)
