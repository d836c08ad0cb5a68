"""Convert an image to sRGB by the ICC profile in its file."""

import io
from functools import lru_cache
from typing import Any

from PIL import Image, ImageCms

# The colour space a profile must have, by image mode: a CMYK profile in an RGB file is left over from a conversion.
SPACES = {"RGB": "RGB", "RGBA": "RGB", "L": "GRAY", "CMYK": "CMYK"}
# Printer profiles have up to 3 MB.
MAX_PROFILE_BYTES = 4_000_000
# A profile that moves no colour by more than littlecms rounds is sRGB under another name, and is skipped.
ROUNDING = 1
# What ImageCms raises for malformed profiles.
PROFILE_ERRORS = (ImageCms.PyCMSError, OSError, ValueError, TypeError)


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert `image`, of mode RGB, RGBA, L, LA, CMYK or LAB, to sRGB.

    RGB and RGBA are converted in place. L and LA stay so without a profile, or become RGB and RGBA. A profile that is
    broken, too large, or for another colour space is ignored.
    """
    if image.mode == "LA":
        colours = image.getchannel("L")
        colours.info = image.info
        converted = to_srgb(colours)
        if converted is colours:
            return image
        converted.putalpha(image.getchannel("A"))
        return converted
    if image.mode == "LAB":
        return _build_transform(ImageCms.createProfile("LAB"), "LAB").apply(image)
    transform = _srgb_transform(image.info.get("icc_profile"), image.mode)
    if transform is None:
        return image.convert("RGB") if image.mode == "CMYK" else image
    if image.mode == transform.output_mode:
        transform.apply_in_place(image)
        return image
    return transform.apply(image)


def _srgb_transform(profile: object, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform to sRGB for pixels of `mode`; None without a usable profile, or where it changes nothing."""
    if not isinstance(profile, bytes) or not 0 < len(profile) <= MAX_PROFILE_BYTES:
        return None
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if opened.profile.xcolor_space.strip() != SPACES[mode]:
            return None
        transform = _build_transform(opened, mode)
    except PROFILE_ERRORS:
        return None
    if mode == "CMYK":
        return transform
    probe = _probe(mode)
    before, after = (image.convert("RGB").tobytes() for image in (probe, transform.apply(probe)))
    moved = max(abs(one - other) for one, other in zip(before, after, strict=True))
    return transform if moved > ROUNDING else None


def _build_transform(profile: Any, mode: str) -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGBA" if mode == "RGBA" else "RGB")


@lru_cache(maxsize=len(SPACES))
def _probe(mode: str) -> Image.Image:
    """Return sample colours from the whole colour space in one row."""
    levels = range(0, 256, 15)
    if mode == "L":
        return Image.frombytes("L", (len(levels), 1), bytes(levels))
    colours = bytes(value for r in levels[::3] for g in levels[::3] for b in levels[::3] for value in (r, g, b))
    return Image.frombytes("RGB", (len(colours) // 3, 1), colours).convert(mode)
