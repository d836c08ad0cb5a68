"""Decode untrusted uploads into upright sRGB images without metadata.

Six formats, a cap on bytes, and a size check on the header before a pixel is decoded: Pillow's own limit is far above
what is needed. Broken metadata (EXIF, profiles, texts) never refuses an image.
"""

from typing import Literal

from PIL import ExifTags, Image

from watermark.colours import to_srgb
from watermark.errors import ImageInvalid, ImageTooLarge, SignatureInvalid
from watermark.image_files import DECODE_ERRORS, open_image
from watermark.samples import to_8_bits

MAX_CONTENT_BYTES = 10_000_000
MAX_SIDE_PX = 4096  # 16 Mpx at most, 67 MB as RGBA
# Decoded size of a reference image, enough for most cameras: 100 MB as RGBA, and twice that while it is converted.
MAX_IMAGE_PX = 25_000_000
# JPEG's own limit. Resizing a strip of 25 million px in one row would take a gigabyte for the filter alone.
MAX_IMAGE_SIDE_PX = 65_535
# A baseline JPEG is decoded at an eighth, a quarter or half of its size, which is as much as a drawing can use; so it
# may have ten times as many pixels.
USEFUL_SIDE_PX = 2048
# Transparent parts are composited on white in an image, on black in a mask.
BACKGROUNDS = {"RGB": (255, 255, 255, 255), "L": (0, 0, 0, 255)}

ImageMode = Literal["RGB", "RGBA", "L"]

TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_signature(content: bytes) -> Image.Image:
    """Decode a file of at most 10 MB and 4096 px a side into a still, upright RGBA image in sRGB, without metadata.

    Raises `SignatureInvalid` for everything else, and for a fully transparent image.
    """
    if len(content) > MAX_CONTENT_BYTES:
        raise SignatureInvalid(
            f"the signature image has {len(content) / 1e6:.1f} MB; at most {MAX_CONTENT_BYTES / 1e6:.0f} MB are read"
        )
    with open_image(content, "the signature", SignatureInvalid) as opened:
        # By the header, before a pixel is decoded.
        if max(opened.size) > MAX_SIDE_PX:
            size = f"{opened.width}x{opened.height} px"
            raise SignatureInvalid(f"the signature image is {size}; at most {MAX_SIDE_PX}x{MAX_SIDE_PX} px are read")
        image = to_rgba(_apply_orientation(opened, _orientation(opened)))
    if image.getchannel("A").getbbox() is None:
        raise SignatureInvalid("the signature image is fully transparent: nothing of it would be seen")
    return image


def decode_image(content: bytes, mode: ImageMode) -> Image.Image:
    """Decode a file of at most 25 Mpx into a still, upright image of `mode` in sRGB, without metadata.

    Images at least twice 2048 px on the shorter side are reduced by a whole factor; a baseline JPEG is scaled while it
    is decoded and may have ten times as many pixels. Alpha is composited on white for RGB and on black for L. Raises
    `ImageInvalid` or `ImageTooLarge`.
    """
    with open_image(content, "the picture", ImageInvalid) as opened:
        # The decoder holds a progressive JPEG at its full size, whatever the scale of its output.
        if opened.format == "JPEG" and not opened.info.get("progressive") and opened.mode in ("RGB", "L"):
            opened.draft(opened.mode, (USEFUL_SIDE_PX, USEFUL_SIDE_PX))
        if max(opened.size) > MAX_IMAGE_SIDE_PX:
            size = f"{opened.width}x{opened.height} px"
            raise ImageTooLarge(f"the picture has {size}; at most {MAX_IMAGE_SIDE_PX} px are read on a side")
        if opened.width * opened.height > MAX_IMAGE_PX:
            size = f"{opened.width}x{opened.height} px, {opened.width * opened.height / 1e6:.0f} Mpx"
            raise ImageTooLarge(f"the picture has {size}; at most {MAX_IMAGE_PX / 1e6:.0f} Mpx are read")
        orientation = _orientation(opened)
        return _convert(_apply_orientation(_reduce(opened), orientation), mode)


def to_rgba(image: Image.Image) -> Image.Image:
    """Return a copy of `image`, of any supported mode, as RGBA in sRGB without metadata."""
    rgba = to_srgb(to_8_bits(image.copy())).convert("RGBA")
    rgba.info = {}
    return rgba


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, from EXIF or XMP; 1 (upright) where those are broken."""
    image.load()
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except DECODE_ERRORS:
        return 1
    return found if isinstance(found, int) else 1


def _apply_orientation(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(TRANSPOSED[orientation]) if orientation in TRANSPOSED else image


def _reduce(image: Image.Image) -> Image.Image:
    """Reduce an image of at least twice the useful side by a whole factor, before anything copies it."""
    factor = min(image.size) // USEFUL_SIDE_PX
    if factor < 2:
        return image
    image = to_8_bits(image)
    if image.mode not in ("L", "RGB", "RGBA"):
        return image
    # Premultiplied, or the colour hidden in transparent pixels bleeds into the edges.
    return image.convert("RGBa").reduce(factor).convert("RGBA") if image.mode == "RGBA" else image.reduce(factor)


def _convert(image: Image.Image, mode: ImageMode) -> Image.Image:
    image = to_8_bits(image)
    if mode == "L" and image.mode == "L":
        pass  # mask levels are amounts: no colour transform
    elif (image := to_srgb(image)).mode != mode:
        image = image.convert("RGBA")
        if mode != "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUNDS[mode]), image).convert(mode)
    image.info = {}
    return image
