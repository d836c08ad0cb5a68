"""Turn bytes that a stranger uploaded into an upright sRGB image without metadata, or say in plain words why not.

Pillow is given six formats, a cap on bytes, and a look at the size in the header before it decodes a pixel: its own
limit is far above what is needed. What only describes the pixels (EXIF, profiles, texts) never refuses a picture.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from PIL import ExifTags, Image, JpegImagePlugin, TiffImagePlugin

from watermark.colours import to_srgb
from watermark.errors import PictureInvalid, PictureTooLarge, SignatureInvalid
from watermark.jpeg_segments import drop_broken_segments
from watermark.png_chunks import SIGNATURE as PNG_SIGNATURE
from watermark.png_chunks import strip_png
from watermark.samples import is_supported, to_8_bits

MAX_CONTENT_BYTES = 10_000_000
MAX_SIDE_PX = 4096  # 16 Mpx at most, 67 MB as RGBA
FORMATS = ("PNG", "WEBP", "GIF", "BMP", "TIFF")  # and JPEG, which is opened without its factory
NAMED_FORMATS = "PNG, JPEG, WebP, GIF, BMP or TIFF"
JPEG_SIGNATURE = b"\xff\xd8\xff"
# Of TIFF's two dozen compressions: what drawing programs and scanners write for pictures. The decoders of the others
# are the most broken ones there are.
TIFF_COMPRESSIONS = frozenset({"raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate"})
MAX_TIFF_PREVIEWS = 4
# The tag that says what a page is, and its bit for a smaller copy of the first.
NEW_SUBFILE_TYPE, REDUCED_RESOLUTION = 254, 1
BITS_PER_SAMPLE = 258
PHOTOMETRIC_INTERPRETATION, WHITE_IS_ZERO = 262, 0
PLANAR_CONFIGURATION, SEPARATE = 284, 2
# The compressions whose planes are not libtiff's to decode.
MISREAD_PLANES = frozenset({"raw", "packbits"})

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

TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow's own limit is of 89 Mpx, before there is a chance to look at what it will take.
Image.MAX_IMAGE_PIXELS = MAX_SCALED_JPEG_PX

# For the whole process, once: `warnings.catch_warnings` around each decoding would not be safe between threads.
warnings.simplefilter("error", Image.DecompressionBombWarning)
# Of descriptions that are broken: the picture is read without them, and a log of JSON lines has no place for it.
warnings.filterwarnings("ignore", "Corrupt EXIF data|Image appears to be a malformed MPO file", UserWarning)

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


def decode_signature(content: bytes) -> Image.Image:
    """Decode a picture of at most 10 MB and 4096 px a side into a still, upright RGBA image in sRGB, without metadata.

    Raises `SignatureInvalid` for everything else, and for an image nothing of which would be seen.
    """
    if len(content) > MAX_CONTENT_BYTES:
        raise SignatureInvalid(
            f"the signature image has {len(content) / 1e6:.1f} MB; at most {MAX_CONTENT_BYTES / 1e6:.0f} MB are read"
        )
    with open_image(content, "the signature", SignatureInvalid) as opened:
        _check_signature_size(opened)
        image = to_rgba(_apply_orientation(opened, _orientation(opened)))
    if image.getchannel("A").getbbox() is None:
        raise SignatureInvalid("the signature image is fully transparent: nothing of it would be seen")
    return image


def decode_picture(content: bytes, mode: PictureMode) -> Image.Image:
    """Decode a picture of at most 25 Mpx into a still, upright image of `mode` in sRGB, without metadata.

    What is larger than is useful comes out smaller, no side below 2048 px by that; so a baseline JPEG may have ten
    times as many pixels. Without alpha asked for, RGB is on white and L on black. Raises `PictureInvalid` or
    `PictureTooLarge`.
    """
    with open_image(content, "the picture", PictureInvalid) as opened:
        _scale_jpeg(opened)
        if max(opened.size) > MAX_PICTURE_SIDE_PX:
            size = f"{opened.width}x{opened.height} px"
            raise PictureTooLarge(f"the picture has {size}; at most {MAX_PICTURE_SIDE_PX} px are read on a side")
        if opened.width * opened.height > MAX_PICTURE_PX:
            size = f"{opened.width}x{opened.height} px, {opened.width * opened.height / 1e6:.0f} Mpx"
            raise PictureTooLarge(f"the picture has {size}; at most {MAX_PICTURE_PX / 1e6:.0f} Mpx are read")
        orientation = _orientation(opened)
        return _convert(_apply_orientation(_reduce(opened), orientation), mode)


def to_rgba(image: Image.Image) -> Image.Image:
    """Return a copy of `image`, of any mode that is decoded, as RGBA in sRGB without metadata."""
    rgba = to_srgb(to_8_bits(image.copy())).convert("RGBA")
    rgba.info = {}
    return rgba


@contextmanager
def open_image(content: bytes, subject: str, invalid: Callable[[str], Exception]) -> Iterator[Image.Image]:
    """The image in `content`, nothing but its header read; what its decoding stumbles over is told as `invalid`."""
    try:
        with _open(content) as opened:
            if opened.width * opened.height > MAX_SCALED_JPEG_PX:
                raise Image.DecompressionBombError
            if reason := _refusal(opened):
                raise invalid(f"{subject} {reason}")
            yield opened
    except DECODE_ERRORS as error:
        raise invalid(_explain(content, error, subject)) from error


def _open(content: bytes) -> Image.Image:
    """Open the first picture of a file."""
    if content.startswith(JPEG_SIGNATURE):
        # Not by Pillow's factory, which makes an animation of a camera's picture with a preview behind it, and a broken
        # file of one whose list of previews is broken.
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
    """A PNG's transparent colour in 8 bits a sample, as its pixels are decoded; the file has it in its own bits."""
    if isinstance(key, tuple):
        return tuple(int(_scaled_key(sample, bits)) for sample in key)  # type: ignore[arg-type]
    return key >> 8 if bits == 16 else (key & ((1 << bits) - 1)) * 255 // ((1 << bits) - 1)


def _refusal(image: Image.Image) -> str:
    """Why an image that was opened is none that is read, or nothing."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        compression = image.info.get("compression")
        if compression not in TIFF_COMPRESSIONS:
            return f"is a TIFF image compressed by {compression}; LZW, deflate, PackBits or none are read"
        if _is_misread(image):
            return "is a TIFF image of 12 bits, of 16 in planes, or of 16 with white as 0; send one of 8 bits a sample"
        if not _is_one_page(image):
            return "holds several pages; send one"
    elif getattr(image, "is_animated", False):
        return "is an animation or holds several pictures; send a still one"
    if not is_supported(image.mode):
        return f"has samples of a kind that is not read (Pillow's mode {image.mode}); 1 to 16 bits without a sign are"
    return ""


def _is_misread(image: TiffImagePlugin.TiffImageFile) -> bool:
    """Whether Pillow would decode other samples than the file holds, in silence."""
    bits = max(image.tag_v2.get(BITS_PER_SAMPLE, (1,)))
    in_planes = image.tag_v2.get(PLANAR_CONFIGURATION) == SEPARATE and image.info.get("compression") in MISREAD_PLANES
    is_negative = image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO
    return bits == 12 or (bits > 8 and (in_planes or is_negative))


def _is_one_page(image: TiffImagePlugin.TiffImageFile) -> bool:
    """Whether nothing is behind the first picture but smaller copies of it."""
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


def _orientation(image: Image.Image) -> int:
    """How the picture is to be turned, by its EXIF or XMP; 1, which is not at all, where those are broken."""
    image.load()
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except DECODE_ERRORS:
        return 1
    return found if isinstance(found, int) else 1


def _apply_orientation(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(TRANSPOSED[orientation]) if orientation in TRANSPOSED else image


def _scale_jpeg(image: Image.Image) -> None:
    # A progressive one is held whole by the decoder, whatever comes out of it.
    if image.format == "JPEG" and not image.info.get("progressive") and image.mode in ("RGB", "L"):
        image.draft(image.mode, (USEFUL_SIDE_PX, USEFUL_SIDE_PX))


def _reduce(image: Image.Image) -> Image.Image:
    """What is twice as large as is useful or more, at a whole part of its size: all that follows takes copies."""
    factor = min(image.size) // USEFUL_SIDE_PX
    if factor < 2:
        return image
    image = to_8_bits(image)
    if image.mode not in ("L", "RGB", "RGBA"):
        return image
    # Premultiplied, or the colour hidden in transparent pixels bleeds into the edges.
    return image.convert("RGBa").reduce(factor).convert("RGBA") if image.mode == "RGBA" else image.reduce(factor)


def _convert(image: Image.Image, mode: PictureMode) -> Image.Image:
    image = to_8_bits(image)
    if mode == "L" and image.mode == "L":
        pass  # the levels of a mask are amounts, and no colours
    elif (image := to_srgb(image)).mode != mode:
        image = image.convert("RGBA")
        if mode != "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUNDS[mode]), image).convert(mode)
    image.info = {}
    return image


def _check_signature_size(image: Image.Image) -> None:
    """Judge what the header tells, before a pixel is decoded."""
    width, height = image.size
    if max(width, height) > MAX_SIDE_PX:
        raise SignatureInvalid(
            f"the signature image is {width}x{height} px; at most {MAX_SIDE_PX}x{MAX_SIDE_PX} px are read"
        )


def _explain(content: bytes, error: Exception, subject: str) -> str:
    start = content[:64].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    look = next((words for prefix, words in LOOKS if start.startswith(prefix)), "no image")
    if content[4:8] == b"ftyp":
        look = "a HEIC or AVIF image, or a film"
    if not content:
        look = "an empty file"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        look = "far too large an image"
    return f"{subject} is no {NAMED_FORMATS} image that can be read: it looks like {look}"
