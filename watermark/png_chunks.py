"""Strip a PNG to the chunks its pixels need, so that no damage to metadata refuses the image.

Pillow parses every chunk before the first pixel, and refuses the file for one bad checksum, one malformed profile or
one text that decompresses to too much.
"""

import struct
import zlib
from typing import NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Length, type and checksum around a chunk's data.
FRAME_BYTES = 12
TRANSPARENCY, ANIMATION = b"tRNS", b"acTL"
ANIMATION_BYTES = 8
# CMYK printer profiles have up to 3 MB.
MAX_PROFILE_BYTES = 4_000_000
MAX_EXIF_BYTES = 64_000
# Encoders write IDAT chunks of 8 kB; 50 MB could hold four million empty chunks, which take seconds to walk.
MAX_CHUNKS = 50_000
# ImageMagick writes EXIF as hexadecimal text after three lines; older camera tools write no other form.
RAW_EXIF = b"Raw profile type exif\0"
XMP = b"XML:com.adobe.xmp\0"


class StrippedPng(NamedTuple):
    """A PNG reduced to its pixels, and its metadata where that is intact."""

    content: bytes
    bits: int
    profile: bytes | None
    exif: bytes | None
    xmp: bytes | None


def strip_png(content: bytes) -> StrippedPng:
    """Separate a PNG's pixels from its metadata; broken pixel chunks are returned as they are."""
    kept = [SIGNATURE]
    profile = exif = xmp = None
    at = len(SIGNATURE)
    for _ in range(MAX_CHUNKS):
        if at + FRAME_BYTES > len(content):
            break
        length, kind = struct.unpack_from(">I4s", content, at)
        chunk = content[at : at + FRAME_BYTES + length]
        at += len(chunk)
        body = chunk[8 : 8 + length]
        is_critical = not kind[0] & 0x20
        # Kept, so that an animation is refused, unless it has one frame: acTL begins with their number.
        is_animated = kind == ANIMATION and len(body) == ANIMATION_BYTES and struct.unpack_from(">I", body)[0] > 1
        if is_critical or kind == TRANSPARENCY or is_animated:
            kept.append(chunk)
        elif len(chunk) == FRAME_BYTES + length and zlib.crc32(chunk[4:-4]) == struct.unpack(">I", chunk[-4:])[0]:
            if profile is None and kind == b"iCCP":
                profile = _decompress(body.partition(b"\0")[2][1:], MAX_PROFILE_BYTES)
            exif = exif or _exif(kind, body)
            xmp = xmp or (body if kind == b"iTXt" and body.startswith(XMP) else None)
        if kind == b"IEND":
            break
    # The bit depth: ninth byte of IHDR's data, the first chunk.
    return StrippedPng(b"".join(kept), content[24] if len(content) > 24 else 8, profile, exif, xmp)


def _exif(kind: bytes, body: bytes) -> bytes | None:
    if kind == b"eXIf":
        return body
    if not body.startswith(RAW_EXIF) or kind not in (b"tEXt", b"zTXt"):
        return None
    text = body.removeprefix(RAW_EXIF)
    lines = ((text if kind == b"tEXt" else _decompress(text[1:], 3 * MAX_EXIF_BYTES)) or b"").split(b"\n", 3)
    try:
        return bytes.fromhex(lines[3].decode("ascii")) if len(lines) == 4 else None
    except ValueError:
        return None  # not hexadecimal: no EXIF


def _decompress(packed: bytes, max_bytes: int) -> bytes | None:
    """Decompress a zlib stream; None where it is broken or larger than `max_bytes`."""
    unpacking = zlib.decompressobj()
    try:
        found = unpacking.decompress(packed, max_bytes)
    except zlib.error:
        return None
    return found if unpacking.eof else None
