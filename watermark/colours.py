"""Bring a picture's colours into sRGB, by the ICC profile in its file."""

import io
from functools import lru_cache
from typing import Any

from PIL import Image, ImageCms

# A profile is for pixels of its own kind: one of CMYK in an RGB picture was left there by a conversion.
SPACES = {"RGB": "RGB", "RGBA": "RGB", "L": "GRAY", "CMYK": "CMYK"}
# Those of printers have up to 3 MB.
MAX_PROFILE_BYTES = 4_000_000
# A profile of sRGB by another name moves a colour by no more than littlecms rounds, and is none.
ROUNDING = 1
# What ImageCms raises for profiles of junk.
PROFILE_ERRORS = (ImageCms.PyCMSError, OSError, ValueError, TypeError)


def to_srgb(image: Image.Image) -> Image.Image:
    """Return `image`, of mode RGB, RGBA, L, LA, CMYK or LAB, in the colours of sRGB.

    RGB and RGBA are converted in place. L and LA stay so without a profile, or become RGB and RGBA. A profile that is
    broken, too large, or of another kind of pixels counts as none.
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
    """The way to sRGB for pixels of `mode`; None where there is none, or nothing to do."""
    if not isinstance(profile, bytes) or not 0 < len(profile) <= MAX_PROFILE_BYTES:
        return None
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if opened.profile.xcolor_space.strip() != SPACES[mode]:
            return None
        transform = _build_transform(opened, mode)
    except PROFILE_ERRORS:
        return None
    return None if mode != "CMYK" and _is_identity(transform, _probe(mode)) else transform


def _build_transform(profile: Any, mode: str) -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGBA" if mode == "RGBA" else "RGB")


@lru_cache(maxsize=len(SPACES))
def _probe(mode: str) -> Image.Image:
    """Colours from all over the space, side by side."""
    levels = range(0, 256, 15)
    if mode == "L":
        return Image.frombytes("L", (len(levels), 1), bytes(levels))
    colours = bytes(value for r in levels[::3] for g in levels[::3] for b in levels[::3] for value in (r, g, b))
    return Image.frombytes("RGB", (len(colours) // 3, 1), colours).convert(mode)


def _is_identity(transform: ImageCms.ImageCmsTransform, probe: Image.Image) -> bool:
    before, after = (image.convert("RGB").tobytes() for image in (probe, transform.apply(probe)))
    return max(abs(one - other) for one, other in zip(before, after, strict=True)) <= ROUNDING
