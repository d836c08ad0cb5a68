"""Keep what a PNG's pixels need, so that no damage to what only describes them refuses the picture.

Pillow parses every chunk before the first pixel, and takes one bad checksum, one profile of junk or one text that
unpacks to too much for a broken file.
"""

import struct
import zlib
from typing import NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Length, kind and checksum around a chunk's content.
FRAME_BYTES = 12
TRANSPARENCY, ANIMATION = b"tRNS", b"acTL"
ANIMATION_BYTES = 8
# CMYK profiles of printers have up to 3 MB.
MAX_PROFILE_BYTES = 4_000_000
MAX_EXIF_BYTES = 64_000
# Programs cut pixels into chunks of 8 kB; of empty chunks 50 MB would hold four million, and take seconds.
MAX_CHUNKS = 50_000
# ImageMagick writes EXIF as a text of hexadecimal digits behind three lines; older cameras' tools have no other.
RAW_EXIF = b"Raw profile type exif\0"
XMP = b"XML:com.adobe.xmp\0"


class StrippedPng(NamedTuple):
    """A PNG of nothing but its pixels, and what described them, where it is whole."""

    content: bytes
    bits: int
    profile: bytes | None
    exif: bytes | None
    xmp: bytes | None


def strip_png(content: bytes) -> StrippedPng:
    """Take a PNG apart; one that is broken where its pixels are comes back broken."""
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
        if is_critical or kind == TRANSPARENCY or (kind == ANIMATION and _num_frames(body) > 1):
            kept.append(chunk)
        elif len(chunk) == FRAME_BYTES + length and zlib.crc32(chunk[4:-4]) == struct.unpack(">I", chunk[-4:])[0]:
            profile = profile or (_profile(body) if kind == b"iCCP" else None)
            exif = exif or _exif(kind, body)
            xmp = xmp or (body if kind == b"iTXt" and body.startswith(XMP) else None)
        if kind == b"IEND":
            break
    # Bits of a sample: the ninth byte of the first chunk, which is the header.
    return StrippedPng(b"".join(kept), content[24] if len(content) > 24 else 8, profile, exif, xmp)


def _num_frames(body: bytes) -> int:
    """How many pictures an animation says that it has: it is kept to be known as one, unless it is of one."""
    return struct.unpack_from(">I", body)[0] if len(body) == ANIMATION_BYTES else 0


def _profile(body: bytes) -> bytes | None:
    _, _, packed = body.partition(b"\0")
    return _unpacked(packed[1:], MAX_PROFILE_BYTES)


def _exif(kind: bytes, body: bytes) -> bytes | None:
    if kind == b"eXIf":
        return body
    if not body.startswith(RAW_EXIF) or kind not in (b"tEXt", b"zTXt"):
        return None
    text = body.removeprefix(RAW_EXIF)
    lines = ((text if kind == b"tEXt" else _unpacked(text[1:], 3 * MAX_EXIF_BYTES)) or b"").split(b"\n", 3)
    try:
        return bytes.fromhex(lines[3].decode("ascii")) if len(lines) == 4 else None
    except ValueError:
        return None  # no hexadecimal digits: such a text describes nothing


def _unpacked(packed: bytes, max_bytes: int) -> bytes | None:
    """Unpack a zlib stream; None where it is broken or larger than `max_bytes`."""
    unpacking = zlib.decompressobj()
    try:
        found = unpacking.decompress(packed, max_bytes)
    except zlib.error:
        return None
    return found if unpacking.eof else None
