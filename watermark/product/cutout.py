"""The product cut out: what is and is not a cut-out. Pure: images in, images out."""

import numpy as np
from PIL import Image

# Alpha that has nothing below this cuts nothing out: cameras and editors write it into every file.
CLEAR = 128
# Fainter pixels are a mask's noise: the product does not end with them.
VISIBLE = 16
# Parts of a picture's pixels: a model that found less has found nothing, one that found more has cut nothing away.
MIN_PART, MAX_PART = 0.001, 0.99
# No picture is drawn larger than that, so no product has to be.
MAX_SIDE_PX = 2048


class CutoutFailed(Exception):
    """There is no product in the picture, or nothing around it to cut away; the message says which."""


def has_transparency(picture: Image.Image) -> bool:
    """Is some part of an RGBA picture transparent?"""
    return bool(np.asarray(picture.getchannel("A")).min() < CLEAR)


def trim(picture: Image.Image) -> Image.Image:
    """The RGBA picture without what is empty around its product. Raises `CutoutFailed` where all of it is empty."""
    bounds = picture.getchannel("A").point([0] * VISIBLE + [255] * (256 - VISIBLE)).getbbox()
    if bounds is None:
        raise CutoutFailed("all of it is transparent")
    return limit_size(picture.crop(bounds))


def limit_size(picture: Image.Image) -> Image.Image:
    """The RGB or RGBA picture, made smaller where a side is longer than any that is drawn."""
    share = MAX_SIDE_PX / max(picture.size)
    if share >= 1:
        return picture
    return resize_premultiplied(picture, (max(1, round(picture.width * share)), max(1, round(picture.height * share))))


def resize_premultiplied(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The RGB or RGBA picture at `size`; premultiplied, or colours of clear pixels would bleed into the edges."""
    if picture.size == size:
        return picture
    if picture.mode != "RGBA":
        return picture.resize(size, Image.Resampling.LANCZOS)
    return picture.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")


def check_cutout(picture: Image.Image) -> Image.Image:
    """A model's cut-out, RGBA and of its picture's whole size, trimmed. Raises `CutoutFailed` where it is none."""
    part = float((np.asarray(picture.getchannel("A")) >= CLEAR).mean())
    if part < MIN_PART:
        raise CutoutFailed("no product was found in it")
    if part > MAX_PART:
        raise CutoutFailed("nothing was found around the product")
    return trim(picture)
