"""Leave out of a JPEG the segments that only describe it and cannot be read, which Pillow takes for a broken file."""

SCAN = 0xDA  # the pixels begin
LENGTH_BYTES = 2
# Application segments by their number: JFIF's, the one of profiles and previews, Photoshop's, Adobe's.
JFIF, PROFILE, PHOTOSHOP, ADOBE = 0xE0, 0xE2, 0xED, 0xEE
# Of what tells how the colours are to be read, and so is kept where it is whole: name and bytes.
WHOLE = {JFIF: (b"JFIF\0", 14), ADOBE: (b"Adobe", 12)}


def drop_broken_segments(content: bytes) -> bytes:
    """Return a JPEG without its profile, previews and Photoshop's own, and without a cut JFIF or Adobe segment."""
    kept = [content[:2]]
    at = 2
    while at + 2 + LENGTH_BYTES <= len(content) and content[at] == 0xFF and content[at + 1] != SCAN:
        kind = content[at + 1]
        # Before a marker there may be any number of filling bytes.
        length = -1 if kind == 0xFF else int.from_bytes(content[at + 2 : at + 4], "big")
        segment = content[at : at + 2 + length]
        if not _is_left_out(kind, segment[2 + LENGTH_BYTES :]):
            kept.append(segment)
        at += 2 + length
    return b"".join([*kept, content[at:]])


def _is_left_out(kind: int, body: bytes) -> bool:
    if kind in (PROFILE, PHOTOSHOP):
        return True
    name, length = WHOLE.get(kind, (b"", 0))
    return kind in WHOLE and body.startswith(name.rstrip(b"\0")) and len(body) < length
