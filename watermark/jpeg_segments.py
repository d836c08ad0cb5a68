"""Drop a JPEG's broken metadata segments, for which Pillow would refuse the whole file."""

SCAN = 0xDA  # start of scan: the entropy-coded pixels follow
LENGTH_BYTES = 2
# Application segments by marker: JFIF (APP0), profiles and previews (APP2), Photoshop (APP13), Adobe (APP14).
JFIF, PROFILE, PHOTOSHOP, ADOBE = 0xE0, 0xE2, 0xED, 0xEE
# Segments that decide the colour transform, kept where they are complete: identifier and bytes.
WHOLE = {JFIF: (b"JFIF\0", 14), ADOBE: (b"Adobe", 12)}


def drop_broken_segments(content: bytes) -> bytes:
    """Return a JPEG without profile, previews and Photoshop segments, and without a truncated JFIF or Adobe segment."""
    kept = [content[:2]]
    at = 2
    while at + 2 + LENGTH_BYTES <= len(content) and content[at] == 0xFF and content[at + 1] != SCAN:
        kind = content[at + 1]
        # Any number of fill bytes may precede a marker.
        length = -1 if kind == 0xFF else int.from_bytes(content[at + 2 : at + 4], "big")
        segment = content[at : at + 2 + length]
        body = segment[2 + LENGTH_BYTES :]
        is_kept = kind not in (PROFILE, PHOTOSHOP)
        if kind in WHOLE:
            name, whole_bytes = WHOLE[kind]
            is_kept = len(body) >= whole_bytes or not body.startswith(name.rstrip(b"\0"))
        if is_kept:
            kept.append(segment)
        at += 2 + length
    return b"".join([*kept, content[at:]])
