"""Open an uploaded image file with Pillow: formats, header checks, and one sentence on why a file is refused."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from PIL import Image, JpegImagePlugin, TiffImagePlugin

from watermark.jpeg_segments import drop_broken_segments
from watermark.png_chunks import SIGNATURE as PNG_SIGNATURE
from watermark.png_chunks import strip_png
from watermark.samples import SUPPORTED_MODES

MAX_FILE_PX = 250_000_000
FORMATS = ("PNG", "WEBP", "GIF", "BMP", "TIFF")  # and JPEG, which is opened without its factory
NAMED_FORMATS = "PNG, JPEG, WebP, GIF, BMP or TIFF"
JPEG_SIGNATURE = b"\xff\xd8\xff"
# Of TIFF's two dozen compressions, those that drawing programs and scanners write. The decoders of the others have the
# worst record of defects.
TIFF_COMPRESSIONS = frozenset({"raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate"})
MAX_TIFF_PREVIEWS = 4
# The tag with a page's kind, and its bit for a reduced copy of the first page.
NEW_SUBFILE_TYPE, REDUCED_RESOLUTION = 254, 1
BITS_PER_SAMPLE = 258
PHOTOMETRIC_INTERPRETATION, WHITE_IS_ZERO = 262, 0
PLANAR_CONFIGURATION, SEPARATE = 284, 2
# The compressions whose planes Pillow decodes without libtiff.
MISREAD_PLANES = frozenset({"raw", "packbits"})

# Pillow's own limit of 89 Mpx applies on opening, before a baseline JPEG can be scaled.
Image.MAX_IMAGE_PIXELS = MAX_FILE_PX

# For the whole process, once: `warnings.catch_warnings` around each decoding would not be safe between threads.
warnings.simplefilter("error", Image.DecompressionBombWarning)
# Warnings about broken metadata: the image is read without it, and plain text does not belong into a JSON log.
warnings.filterwarnings("ignore", "Corrupt EXIF data|Image appears to be a malformed MPO file", UserWarning)

# What Pillow raises for broken files, found by fuzzing.
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

# First bytes, lower case, of what is uploaded as an image.
FILE_KINDS = (
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML document, perhaps an error of the object store or an SVG drawing"),
    (b"<error", "an error of the object store"),
    (b"gif8", "a GIF image that is broken"),
    (b"ii*\x00", "a TIFF image that is broken"),
    (b"mm\x00*", "a TIFF image that is broken"),
    (b"8bps", "a Photoshop file"),
    (b"bm", "a BMP image that is broken"),
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


@contextmanager
def open_image(content: bytes, subject: str, invalid: Callable[[str], Exception]) -> Iterator[Image.Image]:
    """Open the image in `content`, reading only its header; raise decode errors of the block as `invalid`."""
    try:
        with _open(content) as opened:
            if opened.width * opened.height > MAX_FILE_PX:
                raise Image.DecompressionBombError
            if reason := _refusal(opened):
                raise invalid(f"{subject} {reason}")
            yield opened
    except DECODE_ERRORS as error:
        start = content[:64].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
        look = next((words for prefix, words in FILE_KINDS if start.startswith(prefix)), "no image")
        if content[4:8] == b"ftyp":
            look = "a HEIC or AVIF image, or a film"
        if not content:
            look = "an empty file"
        if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
            look = "far too large an image"
        raise invalid(f"{subject} is no {NAMED_FORMATS} image that can be read: it looks like {look}") from error


def _open(content: bytes) -> Image.Image:
    """Open the first image of a file."""
    if content.startswith(JPEG_SIGNATURE):
        # Not by Pillow's factory: it takes a camera's JPEG with an appended preview for an animation, and refuses one
        # whose list of previews is broken.
        try:
            return JpegImagePlugin.JpegImageFile(io.BytesIO(content))
        except DECODE_ERRORS:
            return JpegImagePlugin.JpegImageFile(io.BytesIO(drop_broken_segments(content)))
    if not content.startswith(PNG_SIGNATURE):
        return Image.open(io.BytesIO(content), formats=FORMATS)
    bare = strip_png(content)
    opened = Image.open(io.BytesIO(bare.content), formats=("PNG",))
    described = {"icc_profile": bare.profile, "exif": bare.exif, "xmp": bare.xmp}
    opened.info |= {name: value for name, value in described.items() if value is not None}
    if "transparency" in opened.info and opened.mode in ("L", "RGB"):
        opened.info["transparency"] = _scaled_key(opened.info["transparency"], bare.bits)
    return opened


def _scaled_key(key: int | tuple[int, ...], bits: int) -> int | tuple[int, ...]:
    """Scale a PNG's transparent colour from the file's bit depth to 8 bits a sample, as its pixels are decoded."""
    if isinstance(key, tuple):
        return tuple(int(_scaled_key(sample, bits)) for sample in key)  # type: ignore[arg-type]
    return key >> 8 if bits == 16 else (key & ((1 << bits) - 1)) * 255 // ((1 << bits) - 1)


def _refusal(image: Image.Image) -> str:
    """Return why an opened image is not supported; empty where it is."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        compression = image.info.get("compression")
        if compression not in TIFF_COMPRESSIONS:
            return f"is a TIFF image compressed by {compression}; LZW, deflate, PackBits or none are read"
        bits = max(image.tag_v2.get(BITS_PER_SAMPLE, (1,)))
        in_planes = image.tag_v2.get(PLANAR_CONFIGURATION) == SEPARATE and compression in MISREAD_PLANES
        is_negative = image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO
        # Pillow would silently decode wrong samples.
        if bits == 12 or (bits > 8 and (in_planes or is_negative)):
            return "is a TIFF image of 12 bits, of 16 in planes, or of 16 with white as 0; send one of 8 bits a sample"
        if not _is_one_page(image):
            return "holds several pages; send one"
    elif getattr(image, "is_animated", False):
        return "is an animation or holds several pictures; send a still one"
    if image.mode not in SUPPORTED_MODES and not image.mode.startswith("I;16"):
        return f"has samples of a kind that is not read (Pillow's mode {image.mode}); 1 to 16 bits without a sign are"
    return ""


def _is_one_page(image: TiffImagePlugin.TiffImageFile) -> bool:
    """Return whether all pages after the first are reduced copies of it."""
    try:
        for number in range(1, MAX_TIFF_PREVIEWS + 2):
            image.seek(number)
            if not image.tag_v2.get(NEW_SUBFILE_TYPE, 0) & REDUCED_RESOLUTION:
                return False
    except EOFError:
        return True
    finally:
        image.seek(0)
    return False
