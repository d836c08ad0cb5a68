"""Pictures as cameras, scanners and other programs write them: what only describes the pixels never refuses them."""

import io
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, TiffImagePlugin

from tests.watermark.test_decoding import noise, png, png_chunks
from watermark.decoding import MAX_CONTENT_BYTES, decode_image, decode_signature
from watermark.errors import ImageInvalid, SignatureInvalid
from watermark.png_chunks import MAX_PROFILE_BYTES

BLACK, WHITE, CLEAR = (0, 0, 0, 255), (255, 255, 255, 255), 0


def as_image(decode: str, content: bytes) -> Image.Image:
    return decode_signature(content) if decode == "signature" else decode_image(content, "RGBA")


both = pytest.mark.parametrize("decode", ["signature", "picture"])


def halves(mode: str, left: Any, right: Any, side: int = 16) -> Image.Image:
    image = Image.new(mode, (side, side), left)
    image.paste(right, (side // 2, 0, side, side))
    return image


# --- several pictures in one file ------------------------------------------------------------------------------------


def camera_jpeg(first: Image.Image) -> bytes:
    return png(first, format="MPO", save_all=True, append_images=[Image.new("RGB", (16, 8), "blue")])


@both
@pytest.mark.parametrize("damage", ["none", "an index of junk", "an index that ends"])
def test_camera_jpeg_is_its_first_image(decode: str, damage: str) -> None:
    content = bytearray(camera_jpeg(Image.new("RGB", (64, 32), "red")))
    at = content.index(b"MPF\0") + 4
    if damage == "an index of junk":
        content[at : at + 60] = b"\xee" * 60
    elif damage == "an index that ends":
        content[at + 8 : at + 10] = b"\0\0"

    image = as_image(decode, bytes(content))

    assert image.size == (64, 32)
    assert image.getpixel((9, 9))[0] > 250  # type: ignore[index]


def test_huge_camera_jpeg_is_read_at_a_part_of_its_size() -> None:
    assert decode_image(camera_jpeg(Image.new("RGB", (9600, 6400), "red")), "RGB").size == (4800, 3200)


def tiff_pages(*kinds: int) -> bytes:
    """Write a TIFF of pages whose NewSubfileType is given: 1 is a smaller copy of the first."""
    out = io.BytesIO()
    with TiffImagePlugin.AppendingTiffWriter(out) as writer:
        for number, kind in enumerate(kinds):
            tags = TiffImagePlugin.ImageFileDirectory_v2()
            tags[254] = kind
            Image.new("RGB", (32 - number, 32 - number), "red").save(writer, "TIFF", tiffinfo=tags)
            writer.newFrame()
    return out.getvalue()


@both
def test_tiff_with_smaller_copies_behind_it_is_its_first_page(decode: str) -> None:
    assert as_image(decode, tiff_pages(0, 1, 1)).size == (32, 32)


@pytest.mark.parametrize("kinds", [(0, 0), (0, 1, 0), (0, 2), (0, *[1] * 9)])
def test_tiff_of_several_pages_is_refused(kinds: tuple[int, ...]) -> None:
    with pytest.raises(SignatureInvalid, match="several pages"):
        decode_signature(tiff_pages(*kinds))


# --- the colour that counts as transparent ----------------------------------------------------------------------------


def packed(samples: NDArray[np.int64], bits: int) -> bytes:
    """Pack rows of samples [height, width · channels] with PNG's filter byte into bytes."""
    if bits >= 8:
        rows = [row.astype(f">u{bits // 8}").tobytes() for row in samples]
    else:
        spread = (samples[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        rows = [np.packbits(row.astype(np.uint8)).tobytes() for row in spread.reshape(len(samples), -1)]
    return zlib.compress(b"".join(b"\0" + row for row in rows))


def keyed_png(bits: int, colour_type: int, key: int, other: int, *, side: int = 16, extra_bits: int = 0) -> bytes:
    """Write a PNG by hand, its left half of `key` and its right half of `other`; tRNS names `key`."""
    channels = 3 if colour_type == 2 else 1
    row = [key] * (side // 2 * channels) + [other] * (side // 2 * channels)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, bits, colour_type, 0, 0, 0))]
    if colour_type == 3:
        chunks.append((b"PLTE", bytes(255 * (i == other) for i in range(1 << bits) for _ in "rgb")))
    transparency = bytes(255 * (i != key) for i in range(1 << bits)) if colour_type == 3 else b""
    chunks.append((b"tRNS", transparency or struct.pack(">H", key | extra_bits) * channels))
    chunks += [(b"IDAT", packed(np.tile(row, (side, 1)), bits)), (b"IEND", b"")]
    return png_chunks(*chunks)


@both
@pytest.mark.parametrize("is_white", [True, False])
@pytest.mark.parametrize(
    ("bits", "colour_type"),
    [*((bits, 0) for bits in (1, 2, 4, 8, 16)), (8, 2), (16, 2), *((b, 3) for b in (1, 2, 4, 8))],
)
def test_colour_that_counts_as_transparent_is_clear(decode: str, bits: int, colour_type: int, is_white: bool) -> None:
    last = (1 << bits) - 1
    key, other = (last, 0) if is_white else (0, last)

    image = as_image(decode, keyed_png(bits, colour_type, key, other))

    assert image.getpixel((2, 2))[3] == CLEAR  # type: ignore[index]
    assert image.getpixel((12, 2)) == (WHITE if colour_type == 3 or not is_white else BLACK)


@pytest.mark.parametrize(("bits", "key"), [(2, 1), (4, 7), (8, 99), (16, 40_000)])
def test_grey_between_transparent_and_opaque_counts_as_transparent(bits: int, key: int) -> None:
    # The bits above the samples' own mean nothing.
    image = decode_signature(keyed_png(bits, 0, key, 0, extra_bits=0 if bits == 16 else 0x100 << (bits - 2) & 0xFF00))
    assert [image.getpixel((x, 2))[3] for x in (2, 12)] == [CLEAR, 255]  # type: ignore[index]


@pytest.mark.parametrize(("mode", "ground"), [("RGB", (255, 255, 255)), ("L", 0)])
@pytest.mark.parametrize("side", [16, 4200])
def test_transparent_pixels_are_composited_on_the_ground_of_the_mode(mode: Any, ground: Any, side: int) -> None:
    image = decode_image(keyed_png(8, 0, 120, 60, side=side), mode)
    assert image.mode == mode
    assert image.getpixel((2, 2)) == ground
    assert image.getpixel((image.width - 2, 2)) in ((60, 60, 60), 60)


# --- what only describes the pixels -----------------------------------------------------------------------------------


def with_chunk(kind: bytes, body: bytes, *, is_sound: bool = True) -> bytes:
    content = png(halves("RGB", "red", "blue"))
    checksum = zlib.crc32(kind + body) ^ (not is_sound)
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)
    return content[:33] + chunk + content[33:]


def jpeg_with_exif(exif: bytes) -> bytes:
    return png(halves("RGB", "red", "blue"), format="JPEG", quality=100, subsampling=0, exif=b"Exif\0\0" + exif)


def jpeg_with_segment(kind: int, body: bytes) -> bytes:
    content = png(halves("RGB", "red", "blue"), format="JPEG", quality=100, subsampling=0)
    return content[:2] + b"\xff\xff" + struct.pack(">BH", kind, len(body) + 2) + body + content[2:]


JUNK = bytes(range(1, 200))
BROKEN = {
    "a text of junk": with_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n    8\nno hexadecimal digits\n"),
    "a text that ends": with_chunk(b"tEXt", b"Raw profile type exif\0junk"),
    "a packed text of junk": with_chunk(b"zTXt", b"Raw profile type exif\0\0" + JUNK),
    "a packed text that is a bomb": with_chunk(
        b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(50_000_000))
    ),
    "another text that is a bomb": with_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(50_000_000))),
    "a chunk of junk": with_chunk(b"eXIf", JUNK),
    "a chunk that ends": with_chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x09"),
    "an empty chunk": with_chunk(b"eXIf", b""),
    "a wrong checksum": with_chunk(b"eXIf", b"MM\0*\0\0\0\x08", is_sound=False),
    "a wrong checksum of a text": with_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x/>", is_sound=False),
    "XMP of junk": with_chunk(b"iTXt", b"XML:com.adobe.xmp\0" + JUNK),
    "a size of junk": with_chunk(b"pHYs", b"1"),
    "a profile of junk": with_chunk(b"iCCP", b"icc\0\0" + zlib.compress(JUNK)),
    "a profile that is not packed": with_chunk(b"iCCP", b"icc\0\0" + JUNK),
    "a profile that is a bomb": with_chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(50_000_000))),
    "a JPEG's EXIF of junk": jpeg_with_exif(JUNK),
    "a JPEG's EXIF that ends": jpeg_with_exif(b"MM\0*\0\0\0\x08\0\x09\x01\x12"),
    "a JPEG's EXIF that points behind itself": jpeg_with_exif(b"II*\0\xff\xff\xff\x7f"),
    "a JPEG's orientation that is a text": jpeg_with_exif(
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x02up\0\0\0\0\0\0"
    ),
    "a JPEG's orientation beyond eight": jpeg_with_exif(
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0"
    ),
    "a JPEG's profile of junk": png(halves("RGB", "red", "blue"), format="JPEG", quality=100, icc_profile=JUNK),
    "a JPEG's profile that is cut": jpeg_with_segment(0xE2, b"ICC_PROFILE\0"),
    "a JPEG's first segment that is cut": jpeg_with_segment(0xE0, b"JFIF\0\1"),
    "a JPEG's Adobe segment that is cut": jpeg_with_segment(0xEE, b"Adobe\0"),
    "a JPEG's Photoshop segment that is cut": jpeg_with_segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed"),
    "an animation's chunk that is cut": with_chunk(b"acTL", b"\0\0"),
    "an animation of no picture": with_chunk(b"acTL", bytes(8)),
    "a WebP's EXIF of junk": png(halves("RGB", "red", "blue"), format="WEBP", lossless=True, exif=JUNK),
    "a WebP's profile of junk": png(halves("RGB", "red", "blue"), format="WEBP", lossless=True, icc_profile=JUNK),
}


@both
@pytest.mark.parametrize("name", BROKEN)
def test_broken_description_refuses_no_image(decode: str, name: str) -> None:
    started = time.process_time()
    image = as_image(decode, BROKEN[name])
    assert time.process_time() - started < 1
    (red, _, _, _), (_, _, blue, _) = image.getpixel((2, 8)), image.getpixel((13, 8))  # type: ignore[misc]
    assert min(red, blue) > 240


def corner() -> Image.Image:
    """Draw an image that looks different in all eight orientations."""
    image = Image.new("RGB", (48, 32), "white")
    image.paste((255, 0, 0), (0, 0, 16, 16))
    image.paste((0, 0, 255), (32, 0, 48, 8))
    return image


def xmp(orientation: int) -> bytes:
    rdf = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
    description = f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"/>'
    return (
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{rdf}">{description}</rdf:RDF></x:xmpmeta>'.encode()
    )


def turned(format_: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw, options = exif.tobytes(), {"format": format_.partition(" ")[0], "quality": 100, "lossless": True}
    if format_ == "PNG raw":
        text = f"\nexif\n{len(raw):8}\n{raw.hex()}\n"
        info = PngImagePlugin.PngInfo()
        info.add_text("Raw profile type exif", text, zip=True)
        return png(corner(), pnginfo=info)
    if format_ == "PNG XMP":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp(orientation).decode())
        return png(corner(), pnginfo=info)
    if format_.endswith("XMP"):
        return png(corner(), xmp=xmp(orientation), **options)
    return png(corner(), exif=exif, **options)


@both
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["PNG", "PNG raw", "PNG XMP", "JPEG", "JPEG XMP", "WEBP", "WEBP XMP", "TIFF"])
def test_image_is_turned_upright_by_whatever_describes_its_orientation(
    decode: str, format_: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(png(corner(), exif=exif))))

    image = as_image(decode, turned(format_, orientation))

    assert image.size == expected.size
    difference = np.asarray(image.convert("RGB"), dtype=int) - np.asarray(expected.convert("RGB"), dtype=int)
    assert np.abs(difference).mean() < 8


# --- profiles ---------------------------------------------------------------------------------------------------------

# The primaries of Display P3 and of sRGB, adapted to D50: what Apple and HP write into their profiles.
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
D50 = np.array([0.96420, 1.0, 0.82491])


def fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """Write an ICC profile of version 2 by hand (ICC.1:2001-04), for a display."""
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"mine\0" + bytes(4 + 4 + 2 + 1 + 67),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + fixed(*D50),
    } | tags
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = bytes(4) + struct.pack(">I", 0x02400000) + b"mntr" + space + b"XYZ " + bytes(12) + b"acsp" + bytes(28)
    header += fixed(*D50) + bytes(48)
    whole = header + table + body
    return struct.pack(">I", 4 + len(whole)) + whole


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def rgb_profile(colorants: NDArray[np.float64], gamma: float = 2.2) -> bytes:
    primaries = {
        name: b"XYZ \0\0\0\0" + fixed(*column)
        for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), colorants.T, strict=True)
    }
    return profile(b"RGB ", primaries | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(gamma)))


def srgb_of(colour: tuple[int, int, int], colorants: NDArray[np.float64], gamma: float = 2.2) -> NDArray[np.float64]:
    """Convert the colour to sRGB by IEC 61966-2-1."""
    linear = np.linalg.solve(SRGB, colorants @ (np.array(colour) / 255) ** gamma).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


DISPLAY_P3 = rgb_profile(P3)
GREY_LINEAR = profile(b"GRAY", {b"kTRC": curve(1.0)})
COLOURS = [(200, 100, 50), (90, 160, 110), (60, 60, 200), (240, 240, 240), (255, 0, 0)]


@both
@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("kind", ["PNG", "PNG with alpha", "PNG with a palette", "JPEG", "WEBP", "TIFF"])
def test_wide_colours_are_converted_to_srgb(decode: str, kind: str, colour: tuple[int, int, int]) -> None:
    image = Image.new("RGB", (16, 16), colour)
    if kind == "PNG with alpha":
        image.putalpha(128)
    elif kind == "PNG with a palette":
        image = image.quantize(2)
    options = {"lossless": True, "quality": 100, "subsampling": 0}

    decoded = as_image(decode, png(image, format=kind.partition(" ")[0], icc_profile=DISPLAY_P3, **options))

    *found, alpha = decoded.getpixel((8, 8))  # type: ignore[misc]
    assert found == pytest.approx(srgb_of(colour, P3), abs=3)
    assert alpha == (128 if kind == "PNG with alpha" else 255)
    assert decoded.info == {}


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_greys_are_converted_by_a_profile_of_greys(mode: str) -> None:
    image = Image.new("L", (16, 16), 64 if mode != "1" else 255).convert(mode)
    expected = srgb_of((64, 64, 64), SRGB, 1.0) if mode != "1" else [255] * 3

    decoded = decode_signature(png(image, icc_profile=GREY_LINEAR))

    assert decoded.getpixel((8, 8))[:3] == pytest.approx(expected, abs=2)  # type: ignore[index]


def test_mask_levels_are_not_colour_converted() -> None:
    assert decode_image(png(Image.new("L", (16, 16), 64), icc_profile=GREY_LINEAR), "L").getpixel((8, 8)) == 64


SAME = {
    "sRGB": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    "one of greys in a picture of colours": GREY_LINEAR,
    "one of CMYK in a picture of colours": DISPLAY_P3[:16] + b"CMYK" + DISPLAY_P3[20:],
    "one without its curves": rgb_profile(P3).replace(b"rTRC", b"xTRC"),
    "half of one": DISPLAY_P3[: len(DISPLAY_P3) // 2],
    "an empty one": b"",
    "one that is too large": DISPLAY_P3 + bytes(MAX_PROFILE_BYTES),
}


@both
@pytest.mark.parametrize("name", SAME)
def test_empty_profile_changes_nothing(decode: str, name: str) -> None:
    image = noise(64, 64)
    decoded = as_image(decode, png(image, icc_profile=SAME[name]))
    np.testing.assert_array_equal(np.asarray(decoded.convert("RGB")), np.asarray(image))


# --- GIF, BMP and TIFF ------------------------------------------------------------------------------------------------

RGB, GREEN = (10, 120, 30), (10, 120, 30, 255)
ALPHA = Image.new("RGBA", (16, 16), (10, 120, 30, 77))
READ: dict[str, tuple[bytes, tuple[int, ...]]] = {
    "gif": (png(Image.new("RGB", (16, 16), RGB), format="GIF"), GREEN),
    "bmp": (png(Image.new("RGB", (16, 16), RGB), format="BMP"), GREEN),
    "bmp of 1 bit": (png(Image.new("1", (16, 16), 1), format="BMP"), WHITE),
    "bmp with a palette": (png(Image.new("RGB", (16, 16), RGB).quantize(4), format="BMP"), GREEN),
    **{
        f"tiff, {compression}": (png(Image.new("RGB", (16, 16), RGB), format="TIFF", compression=compression), GREEN)
        for compression in ("raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate")
    },
    "tiff with alpha": (png(ALPHA, format="TIFF"), (10, 120, 30, 77)),
    "tiff of 1 bit": (png(Image.new("1", (16, 16), 1), format="TIFF"), WHITE),
    "tiff of 16 bits": (png(Image.fromarray(np.full((16, 16), 0x8040, np.uint16)), format="TIFF"), (128,) * 3 + (255,)),
    "tiff in CMYK": (png(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), format="TIFF"), (0, 255, 255, 255)),
    "tiff in Lab": (png(Image.new("LAB", (16, 16), (255, 128, 128)), format="TIFF"), WHITE),
}


@both
@pytest.mark.parametrize("name", READ)
def test_gif_bmp_and_tiff_are_read(decode: str, name: str) -> None:
    content, colour = READ[name]
    image = as_image(decode, content)
    assert image.getpixel((8, 8)) == pytest.approx(colour, abs=2)


def test_clear_part_of_a_gif_is_clear() -> None:
    image = halves("P", 0, 1)
    image.putpalette([255, 255, 255, 0, 0, 0])
    decoded = decode_signature(png(image, format="GIF", transparency=0))
    assert (decoded.getpixel((2, 8))[3], decoded.getpixel((13, 8))) == (CLEAR, BLACK)  # type: ignore[index]


def large_gif() -> bytes:
    return b"GIF89a" + struct.pack("<HH", 65535, 65535) + png(Image.new("P", (8, 8)), format="GIF")[10:]


def large_bmp() -> bytes:
    content = bytearray(png(Image.new("RGB", (8, 8)), format="BMP"))
    content[18:26] = struct.pack("<ii", 40_000, 40_000)
    return bytes(content)


def large_tiff() -> bytes:
    return png(Image.new("L", (5000, 8)), format="TIFF", compression="tiff_lzw")


def tiff_of_16_bits(*, photometric: int, samples: int = 1, planar: int = 1, bits: int = 16) -> bytes:
    """Write a TIFF of 8 by 8 px by hand, without compression."""
    size = 8 * 8 * bits // 8
    tags = {256: 8, 257: 8, 258: bits, 259: 1, 262: photometric, 277: samples, 278: 8, 279: size, 284: planar}
    count, end = len(tags) + 1, 8 + 2 + 12 * (len(tags) + 1) + 4
    lists = {258: (3, [bits] * 3), 273: (4, [end + 64 + size * n for n in range(3)]), 279: (4, [size] * 3)}
    out, behind = b"II*\0" + struct.pack("<IH", 8, count), b""
    for tag, value in sorted((tags | {273: end + 64}).items()):
        if samples == 1 or tag not in lists:
            out += struct.pack("<HHII", tag, 4, 1, value)
        else:
            kind, values = lists[tag]
            out += struct.pack("<HHII", tag, kind, 3, end + len(behind))
            behind += struct.pack("<3" + ("H" if kind == 3 else "I"), *values)
    return out + bytes(4) + behind.ljust(64, b"\0") + b"\xff\x80" * (size * samples // 2)


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "gif of 4 Gpx": (large_gif, "far too large"),
    "bmp of 1.6 Gpx": (large_bmp, "far too large"),
    "png of 800000 chunks": (lambda: png_chunks() + png_chunks((b"teSt", b""))[8:] * 800_000, "broken"),
    "tiff of 5000 px": (large_tiff, "5000x8 px"),
    "tiff with a jpeg inside": (lambda: png(noise(), format="TIFF", compression="jpeg"), "compressed by jpeg; LZW"),
    "tiff of a fax": (lambda: png(noise().convert("1"), format="TIFF", compression="group4"), "compressed by group4"),
    "tiff of floats": (lambda: png(Image.new("F", (8, 8)), format="TIFF"), "samples of a kind"),
    "tiff of 32 bits": (lambda: png(Image.new("I", (8, 8)), format="TIFF"), "samples of a kind"),
    "tiff of 16 bits with white as 0": (lambda: tiff_of_16_bits(photometric=0), "16 with white as 0"),
    "tiff of 16 bits in planes": (lambda: tiff_of_16_bits(photometric=2, samples=3, planar=2), "16 in planes"),
    "tiff of 12 bits": (lambda: tiff_of_16_bits(photometric=1, bits=12), "of 12 bits"),
    "half a tiff": (lambda: png(noise(), format="TIFF", compression="tiff_lzw")[:3000], "broken"),
    "half a bmp": (lambda: png(noise(), format="BMP")[:3000], "broken"),
    "half a gif": (lambda: png(noise(), format="GIF")[:3000], "broken"),
    "heic": (lambda: b"\0\0\0\x18ftypheic" + bytes(100), "HEIC"),
    "jpeg 2000": (lambda: png(noise(), format="JPEG2000"), "no PNG, JPEG, WebP, GIF, BMP or TIFF image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_image_too_large_or_of_an_odd_format_is_refused_at_once(name: str) -> None:
    make, words = REFUSED[name]
    content = make()
    assert len(content) < MAX_CONTENT_BYTES
    started = time.process_time()
    with pytest.raises(SignatureInvalid, match=words):
        decode_signature(content)
    assert time.process_time() - started < 1


@both
def test_animation_of_one_image_is_that_image(decode: str) -> None:
    image = as_image(decode, with_chunk(b"acTL", struct.pack(">II", 1, 0)))
    assert image.getpixel((2, 8))[0] > 240  # type: ignore[index]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animation_is_refused_as_one(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green")]
    with pytest.raises(ImageInvalid, match="animation"):
        decode_image(png(frames[0], format=kind, save_all=True, append_images=frames[1:]), "RGB")
