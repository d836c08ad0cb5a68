"""Turns bytes somebody uploaded into an RGBA image, or says in plain words why not.

Pillow is given three formats, a cap on bytes, and a look at the size in the header before it decodes a pixel: its own
limit begins at 89 Mpx, far above what a signature needs.
"""

import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, ImageOps

from watermark.errors import SignatureInvalid

MAX_CONTENT_BYTES = 10_000_000
MAX_SIDE_PX = 4096  # 16 Mpx at most, 67 MB as RGBA
FORMATS = ("PNG", "JPEG", "WEBP")

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
    """Decode a PNG, JPEG or WebP of at most 10 MB and 4096 px a side into a still, upright RGBA image without metadata.

    Raises `SignatureInvalid` for everything else, and for an image nothing of which would be seen.
    """
    if len(content) > MAX_CONTENT_BYTES:
        raise SignatureInvalid(
            f"the signature image has {len(content) / 1e6:.1f} MB; at most {MAX_CONTENT_BYTES / 1e6:.0f} MB are read"
        )
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            _check_header(opened)
            image = to_rgba(ImageOps.exif_transpose(opened))
    except DECODE_ERRORS as error:
        raise SignatureInvalid(_explain(content, error)) from error

    if image.getchannel("A").getbbox() is None:
        raise SignatureInvalid("the signature image is fully transparent: nothing of it would be seen")
    return image


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


def _check_header(image: Image.Image) -> None:
    """Judge what the header tells, before a pixel is decoded."""
    width, height = image.size
    if max(width, height) > MAX_SIDE_PX:
        raise SignatureInvalid(
            f"the signature image is {width}x{height} px; at most {MAX_SIDE_PX}x{MAX_SIDE_PX} px are read"
        )
    if getattr(image, "is_animated", False):
        raise SignatureInvalid("the signature image is an animation or holds several pictures; send a still one")


def _explain(content: bytes, error: Exception) -> str:
    start = content[:64].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    look = next((words for prefix, words in LOOKS if start.startswith(prefix)), "no image")
    if not content:
        look = "an empty file"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        look = "far too large an image"
    return f"the signature is no PNG, JPEG or WebP image that can be read: it looks like {look}"
