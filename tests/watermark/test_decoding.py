"""What may be a signature image, and what is refused: at once, and in words a person understands."""

import io
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from watermark.decoding import MAX_CONTENT_BYTES, decode_signature
from watermark.errors import SignatureInvalid

RED = (255, 0, 0, 255)


def noise(width: int = 200, height: int = 100) -> Image.Image:
    """Draw an image no two neighbouring pixels of which are alike."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, options.pop("format", "PNG"), **options)
    return content.getvalue()


def png_chunks(*chunks: tuple[bytes, bytes]) -> bytes:
    """Write a PNG file by hand, checksums right."""
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_header(width: int, height: int) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)


def as_rgba(image: Image.Image, pixel: tuple[int, int] = (0, 0)) -> Any:
    assert image.mode == "RGBA"
    assert image.info == {}
    return image.getpixel(pixel)


def palette_with_transparency() -> bytes:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((3, 3), 0)
    return png(image, transparency=0)


@pytest.mark.parametrize(
    ("content", "colour"),
    [
        pytest.param(png(Image.new("RGBA", (4, 4), (10, 20, 30, 40))), (10, 20, 30, 40), id="rgba"),
        pytest.param(png(Image.new("RGB", (4, 4), (10, 20, 30))), (10, 20, 30, 255), id="rgb"),
        pytest.param(png(Image.new("LA", (4, 4), (10, 40))), (10, 10, 10, 40), id="grey-alpha"),
        pytest.param(png(Image.new("1", (4, 4), 1)), (255, 255, 255, 255), id="1-bit"),
        pytest.param(palette_with_transparency(), (10, 20, 30, 255), id="palette"),
        pytest.param(png(Image.fromarray(np.full((4, 4), 0x8040, np.uint16))), (128, 128, 128, 255), id="16-bit"),
        pytest.param(png(Image.new("RGB", (4, 4), (255, 0, 0)), format="WEBP", lossless=True), RED, id="webp"),
        pytest.param(png(Image.new("L", (16, 16), 77), format="JPEG"), (77, 77, 77, 255), id="grey-jpeg"),
        pytest.param(png(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), format="JPEG"), (255,) * 4, id="cmyk-jpeg"),
    ],
)
def test_every_kind_of_pixel_becomes_rgba(content: bytes, colour: tuple[int, ...]) -> None:
    assert as_rgba(decode_signature(content)) == colour


def test_the_transparent_colour_of_a_palette_stays_transparent() -> None:
    assert as_rgba(decode_signature(palette_with_transparency()), (3, 3))[3] == 0


def test_photographed_signature_is_turned_upright_and_loses_its_metadata() -> None:
    image = Image.new("RGB", (32, 16), "white")
    image.paste((255, 0, 0), (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn clockwise: what is left comes to the top
    exif[0x010E] = "where the artist lives"

    decoded = decode_signature(png(image, format="JPEG", quality=95, exif=exif, icc_profile=b"profile"))

    assert decoded.size == (16, 32)
    assert as_rgba(decoded, (8, 4))[1] < 20
    assert as_rgba(decoded, (8, 28))[1] > 230
    assert dict(decoded.getexif()) == {}


def text_bomb() -> bytes:
    return png_chunks(
        png_header(4, 4), (b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 50_000_000)), (b"IDAT", b""), (b"IEND", b"")
    )


def profile_bomb() -> bytes:
    return png_chunks(
        png_header(4, 4), (b"iCCP", b"icc\0\0" + zlib.compress(b"x" * 50_000_000)), (b"IDAT", b""), (b"IEND", b"")
    )


def short_pixels() -> bytes:
    return png_chunks(png_header(4000, 4000), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b""))


def large_webp(side: int) -> bytes:
    """Write a WebP with `side` x `side` px in its header."""
    content = bytearray(png(Image.new("RGBA", (8, 8), RED), format="WEBP", lossless=True))
    assert content[12:16] == b"VP8L"
    content[21:25] = struct.pack("<I", (side - 1) | (side - 1) << 14 | 1 << 28)
    return bytes(content)


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    return png(frames[0], format=kind, save_all=True, append_images=frames[1:])


def with_text(image: Image.Image) -> bytes:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("comment", "x" * 10)
    return png(image, pnginfo=chunks)


PHOTO = png(noise(), format="JPEG")
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "65535 px header": (lambda: png_chunks(png_header(65535, 65535), (b"IDAT", b"x" * 200), (b"IEND", b"")), "large"),
    "12000 px header": (lambda: png_chunks(png_header(12000, 12000), (b"IDAT", b""), (b"IEND", b"")), "12000x12000 px"),
    "9000 px": (lambda: png(Image.new("1", (9000, 9000))), "9000x9000 px"),
    "one long side": (lambda: png(Image.new("1", (4097, 1))), "4097x1 px"),
    "16383 px webp": (lambda: large_webp(16383), "far too large"),
    "9000 px webp": (lambda: large_webp(9000), "9000x9000 px"),
    "too many bytes": (lambda: PHOTO + b"\0" * MAX_CONTENT_BYTES, "10 MB"),
    "animated webp": (lambda: animated("WEBP"), "animation"),
    "animated png": (lambda: animated("PNG"), "animation"),
    "animated gif": (lambda: animated("GIF"), "animation"),
    "tiff of several pages": (lambda: animated("TIFF"), "several pages"),
    "truncated gif": (lambda: png(noise(), format="GIF")[:300], "GIF"),
    "truncated tiff": (lambda: png(noise(), format="TIFF")[:60], "TIFF"),
    "truncated bmp": (lambda: png(noise(), format="BMP")[:60], "BMP"),
    "eps": (lambda: png(noise(), format="EPS"), "PostScript"),
    "pdf": (lambda: png(noise(), format="PDF"), "PDF"),
    "psd": (lambda: b"8BPS\0\x01" + b"\0" * 40, "Photoshop"),
    "svg": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "web page": (lambda: b"\n<!DOCTYPE html><html><h1>403 Forbidden</h1></html>", "web page"),
    "store's error": (lambda: b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", "object store"),
    "empty": (lambda: b"", "empty"),
    "random": (lambda: np.random.default_rng(1).bytes(5000), "no image"),
    "text bomb": (text_bomb, "broken"),
    "profile bomb": (profile_bomb, "broken"),
    "too few pixels": (short_pixels, "broken"),
    "truncated jpeg": (lambda: PHOTO[: len(PHOTO) // 2], "broken"),
    "truncated png": (lambda: png(noise())[:9000], "broken"),
    "truncated webp": (lambda: png(noise(), format="WEBP", lossless=True)[:3000], "broken"),
    "header only": (lambda: png(noise())[:33], "broken"),
    "nothing to see": (lambda: png(Image.new("RGBA", (64, 64), (1, 2, 3, 0))), "transparent"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_hostile_content_is_refused_at_once_with_a_plain_message(name: str) -> None:
    make, words = HOSTILE[name]
    content = make()
    started = time.process_time()

    with pytest.raises(SignatureInvalid, match=words):
        decode_signature(content)

    assert time.process_time() - started < 1


@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}], ids=str)
@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_a_still_signature_of_a_scanner_or_an_old_editor_is_read(kind: str, options: dict[str, str]) -> None:
    drawn = Image.new("RGB", (40, 20), 0)
    drawn.paste(1 if drawn.mode == "1" else (255, 255, 255), (0, 0, 20, 20))

    read = decode_signature(png(drawn, format=kind, **(options if kind == "TIFF" else {})))

    assert (read.mode, read.size) == ("RGBA", (40, 20))
    assert (read.getpixel((5, 5)), read.getpixel((35, 5))) == ((255, 255, 255, 255), (0, 0, 0, 255))


def test_a_gif_keeps_what_is_transparent() -> None:
    drawn = Image.new("P", (8, 8), 1)
    drawn.putpalette([0, 0, 0, 200, 30, 40])
    drawn.paste(0, (0, 0, 4, 8))

    read = decode_signature(png(drawn, format="GIF", transparency=0))

    assert (read.getpixel((1, 1))[3], read.getpixel((6, 6))) == (0, (200, 30, 40, 255))  # type: ignore[index]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(
        [
            *(PHOTO, with_text(noise(40, 40)), palette_with_transparency()),
            *(png(noise(40, 40), format=kind) for kind in ("WEBP", "GIF", "BMP", "TIFF")),
            png(noise(40, 40), format="TIFF", compression="tiff_lzw"),
        ]
    ),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_damaged_files_decode_or_are_refused(content: bytes, damage: list[tuple[float, int]]) -> None:
    damaged = bytearray(content)
    for place, value in damage:
        damaged[int(place * len(damaged))] = value
    try:
        assert decode_signature(bytes(damaged)).mode == "RGBA"
    except SignatureInvalid as refused:
        assert "signature" in str(refused)
