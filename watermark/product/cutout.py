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


def has_transparency(picture: Image.Image) -> bool:
    """Return whether some part of an RGBA image is transparent."""
    return bool(np.asarray(picture.getchannel("A")).min() < CLEAR)


def trim(picture: Image.Image) -> Image.Image:
    """Crop the RGBA image to its visible pixels. Raises `CutoutFailed` where there are none."""
    bounds = picture.getchannel("A").point([0] * VISIBLE + [255] * (256 - VISIBLE)).getbbox()
    if bounds is None:
        raise CutoutFailed("all of it is transparent")
    return limit_size(picture.crop(bounds))


def limit_size(picture: Image.Image) -> Image.Image:
    """Downscale an RGB or RGBA image whose longer side exceeds `MAX_SIDE_PX`."""
    share = MAX_SIDE_PX / max(picture.size)
    if share >= 1:
        return picture
    return resize_premultiplied(picture, (max(1, round(picture.width * share)), max(1, round(picture.height * share))))


def resize_premultiplied(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize an RGB or RGBA image; premultiplied, or colours of transparent pixels would bleed into the edges."""
    if picture.size == size:
        return picture
    if picture.mode != "RGBA":
        return picture.resize(size, Image.Resampling.LANCZOS)
    return picture.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")


def check_cutout(picture: Image.Image) -> Image.Image:
    """Trim a model's RGBA cut-out of a whole image. Raises `CutoutFailed` where it found or removed nothing."""
    part = float((np.asarray(picture.getchannel("A")) >= CLEAR).mean())
    if part < MIN_PART:
        raise CutoutFailed("no product was found in it")
    if part > MAX_PART:
        raise CutoutFailed("nothing was found around the product")
    return trim(picture)
