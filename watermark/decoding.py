"""Turns bytes somebody uploaded into an upright image without metadata, or says in plain words why not.

Pillow is given a few formats, a cap on bytes, and a look at the size in the header before it decodes a pixel: its own
limit is far above what is needed.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from watermark.errors import PictureInvalid, PictureTooLarge, SignatureInvalid

MAX_CONTENT_BYTES = 10_000_000
MAX_SIDE_PX = 4096  # 16 Mpx at most, 67 MB as RGBA
FORMATS = ("PNG", "JPEG", "WEBP")
# Scanners and old editors write these; a reference picture comes from a publisher's own tools.
SIGNATURE_FORMATS = (*FORMATS, "GIF", "BMP", "TIFF")

# Of a reference picture, as it is held in memory: what most cameras take. 100 MB as RGBA, and twice that for a moment.
MAX_PICTURE_PX = 25_000_000
# JPEG's own. Making a strip of 25 million px in one row smaller would take a gigabyte for the filter alone.
MAX_PICTURE_SIDE_PX = 65_535
# A baseline JPEG is decoded at an eighth, a quarter or half of its size, which is as much as a drawing can use.
USEFUL_SIDE_PX = 2048
MAX_SCALED_JPEG_PX = 250_000_000
# Transparent parts of a picture are shown on white, those of a mask are no part of it.
BACKGROUNDS = {"RGB": (255, 255, 255, 255), "L": (0, 0, 0, 255)}

PictureMode = Literal["RGB", "RGBA", "L"]

# Pillow's own limit is of 89 Mpx, before there is a chance to look at what it will take.
Image.MAX_IMAGE_PIXELS = MAX_SCALED_JPEG_PX

# For the whole process, once: `warnings.catch_warnings` around each decoding would not be safe between threads.
warnings.simplefilter("error", Image.DecompressionBombWarning)

# What Pillow lets through on broken files, as seen by feeding it some.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    LookupError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)

# First bytes, lower case, of what turns up under the name of an image.
LOOKS = (
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML document, perhaps an error of the object store or an SVG drawing"),
    (b"<error", "an error of the object store"),
    (b"gif8", "a GIF image"),
    (b"ii*\x00", "a TIFF image"),
    (b"mm\x00*", "a TIFF image"),
    (b"8bps", "a Photoshop file"),
    (b"bm", "a BMP image"),
    (b"%!ps", "a PostScript file"),
    (b"\xc5\xd0\xd3\xc6", "a PostScript file"),
    (b"%pdf", "a PDF file"),
    (b"pk\x03\x04", "a ZIP archive"),
    (b"version https://git-lfs", "a Git LFS pointer"),
    (b"{", "JSON text"),
    (b"\x89png", "a PNG image that is broken"),
    (b"\xff\xd8", "a JPEG image that is broken"),
    (b"riff", "a WebP image that is broken"),
)


def decode_signature(content: bytes) -> Image.Image:
    """Decode one of `SIGNATURE_FORMATS`, of at most 10 MB and 4096 px a side, to a still, upright RGBA image.

    It has no metadata. Raises `SignatureInvalid` for everything else, and for an image nothing of which would be seen.
    """
    if len(content) > MAX_CONTENT_BYTES:
        raise SignatureInvalid(
            f"the signature image has {len(content) / 1e6:.1f} MB; at most {MAX_CONTENT_BYTES / 1e6:.0f} MB are read"
        )
    with _opened(content, "the signature", SignatureInvalid, SIGNATURE_FORMATS) as opened:
        _check_signature_size(opened)
        image = to_rgba(ImageOps.exif_transpose(opened))
    if image.getchannel("A").getbbox() is None:
        raise SignatureInvalid("the signature image is fully transparent: nothing of it would be seen")
    return image


def decode_picture(content: bytes, mode: PictureMode) -> Image.Image:
    """Decode a PNG, JPEG or WebP of at most 25 Mpx into a still, upright image of `mode` without metadata.

    What is larger than is useful comes out smaller, no side below 2048 px by that; so a baseline JPEG may have ten
    times as many pixels. Without
    alpha asked for, RGB is on white and L on black. Raises `PictureInvalid` or `PictureTooLarge`.
    """
    with _opened(content, "the picture", PictureInvalid) as opened:
        _scale_jpeg(opened)
        if max(opened.size) > MAX_PICTURE_SIDE_PX:
            size = f"{opened.width}x{opened.height} px"
            raise PictureTooLarge(f"the picture has {size}; at most {MAX_PICTURE_SIDE_PX} px are read on a side")
        if opened.width * opened.height > MAX_PICTURE_PX:
            size = f"{opened.width}x{opened.height} px, {opened.width * opened.height / 1e6:.0f} Mpx"
            raise PictureTooLarge(f"the picture has {size}; at most {MAX_PICTURE_PX / 1e6:.0f} Mpx are read")
        return _as_mode(ImageOps.exif_transpose(_reduced(opened)), mode)


def to_rgba(image: Image.Image) -> Image.Image:
    """Return a copy of `image`, of any mode Pillow decodes PNG, JPEG and WebP to, as RGBA without metadata."""
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16 bits at 255 instead of scaling them: all but black turns white.
        samples = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((samples + 128) // 257).clip(0, 255).astype(np.uint8))
    if image.mode == "CMYK":
        image = image.convert("RGB")
    rgba = image.convert("RGBA")
    rgba.info = {}
    return rgba


@contextmanager
def _opened(
    content: bytes, subject: str, invalid: Callable[[str], Exception], formats: tuple[str, ...] = FORMATS
) -> Iterator[Image.Image]:
    """The image in `content`, nothing but its header read; what its decoding stumbles over is told as `invalid`."""
    try:
        with Image.open(io.BytesIO(content), formats=formats) as opened:
            if getattr(opened, "is_animated", False):
                raise invalid(f"{subject} is an animation or holds several pictures; send a still one")
            yield opened
    except DECODE_ERRORS as error:
        raise invalid(_explain(content, error, subject, formats)) from error


def _scale_jpeg(image: Image.Image) -> None:
    # A progressive one is held whole by the decoder, whatever comes out of it.
    if image.format == "JPEG" and not image.info.get("progressive") and image.mode in ("RGB", "L"):
        image.draft(image.mode, (USEFUL_SIDE_PX, USEFUL_SIDE_PX))


def _reduced(image: Image.Image) -> Image.Image:
    """What is twice as large as is useful or more, at a whole part of its size: all that follows takes copies."""
    factor = min(image.size) // USEFUL_SIDE_PX
    if factor < 2 or image.mode not in ("L", "RGB", "RGBA"):
        return image
    orientation = image.getexif()
    # Premultiplied, or the colour hidden in transparent pixels bleeds into the edges.
    small = image.convert("RGBa").reduce(factor).convert("RGBA") if image.mode == "RGBA" else image.reduce(factor)
    small.info["exif"] = orientation.tobytes()
    return small


def _as_mode(image: Image.Image, mode: PictureMode) -> Image.Image:
    if image.mode == mode:
        image.info = {}
        return image
    rgba = to_rgba(image)
    if mode == "RGBA":
        return rgba
    return Image.alpha_composite(Image.new("RGBA", rgba.size, BACKGROUNDS[mode]), rgba).convert(mode)


def _check_signature_size(image: Image.Image) -> None:
    """Judge what the header tells, before a pixel is decoded."""
    width, height = image.size
    if max(width, height) > MAX_SIDE_PX:
        raise SignatureInvalid(
            f"the signature image is {width}x{height} px; at most {MAX_SIDE_PX}x{MAX_SIDE_PX} px are read"
        )


def _explain(content: bytes, error: Exception, subject: str, formats: tuple[str, ...]) -> str:
    start = content[:64].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    look = next((words for prefix, words in LOOKS if start.startswith(prefix)), "no image")
    if not content:
        look = "an empty file"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        look = "far too large an image"
    return f"{subject} is no {_listed(formats)} image that can be read: it looks like {look}"


def _listed(formats: tuple[str, ...]) -> str:
    *others, last = (name.replace("WEBP", "WebP") for name in formats)
    return f"{', '.join(others)} or {last}"
