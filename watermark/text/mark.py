"""Check texts, and draw one line as a mark: white with a thin dark outline, for light and dark images."""

import unicodedata
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from watermark.errors import OverlayInvalid, SignatureInvalid
from watermark.text.shaping import ENCLOSING, HINTS, SPELLING, without_hints

MAX_TEXT_CHARS = 100

# Controls, invisible formatting (bidirectional overrides forge names), surrogates, private and unassigned, line breaks.
# Format characters that are spelling are drawn, and break hints removed: see `shaping`.
REFUSED_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}

# Below this Hangul is unreadable, so small images get a text wider than requested.
MIN_FONT_PX = 11
MAX_FONT_PX = 1024
OUTLINE_PER_FONT_PX = 1 / 20
OUTLINE_GREY = 24


def clean_text(text: str) -> str:
    """Return `text` in Unicode NFC with single plain spaces; raise `SignatureInvalid` where it is no line of text."""
    if refused := _refused_characters(text):
        raise SignatureInvalid(f"the signature text has characters that cannot be drawn: {refused}")
    line = _normalize(text)
    if not line:
        raise SignatureInvalid("the signature text is empty")
    if len(line) > MAX_TEXT_CHARS:
        raise SignatureInvalid(f"the signature text has {len(line)} characters; at most {MAX_TEXT_CHARS} are drawn")
    return line


def clean_lines(text: str) -> tuple[str, ...]:
    r"""Split a headline at \n and normalize each line as `clean_text` does; collapse runs of empty lines to one.

    Raises `OverlayInvalid` where the text has undrawable characters, or is empty.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    if refused := _refused_characters("".join(lines)):
        raise OverlayInvalid(f"the text has characters that cannot be drawn: {refused}")
    plain = [_normalize(line) for line in lines]
    kept = [line for line, before in zip(plain, ["", *plain], strict=False) if line or before]
    while kept and not kept[-1]:
        kept.pop()
    if not kept:
        raise OverlayInvalid("the text is empty")
    return tuple(kept)


def _refused_characters(text: str) -> str:
    """List up to five characters of `text` that are not drawn."""
    refused = {char for char in text if unicodedata.category(char) in REFUSED_CATEGORIES}
    return ", ".join(sorted(f"U+{ord(char):04X}" for char in refused - SPELLING - ENCLOSING - HINTS)[:5])


def _normalize(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", without_hints(text)).split())


@lru_cache(maxsize=4096)
def is_visible(text: str, font: Path, index: int = 0) -> bool:
    """Return whether `text` has any ink: fillers such as U+3164 are letters to Unicode, but blank."""
    return ImageFont.truetype(font, MIN_FONT_PX, index=index).getmask(text).getbbox() is not None


def draw_text(text: str, font: Path, *, fit: tuple[int, int], limit: tuple[int, int]) -> Image.Image:
    """Draw one line as large as fits into `fit`, or at `MIN_FONT_PX` where that still fits into `limit`.

    `fit` and `limit` are (width, height) in px; the mark is RGBa (premultiplied), cropped to its ink and at most
    `limit` large.
    """
    font_px = _largest_font_px(text, font, fit, low=1, high=MAX_FONT_PX)
    if font_px < MIN_FONT_PX:
        font_px = _largest_font_px(text, font, limit, low=font_px, high=MIN_FONT_PX)
    drawn_font = ImageFont.truetype(font, font_px)
    left, top, right, bottom = _ink_box(text, drawn_font)
    size, origin = (right - left, bottom - top), (-left, -top)
    inside = _coverage(text, drawn_font, size, origin, outline_px=0)
    around = _coverage(text, drawn_font, size, origin, outline_px=_outline_px(drawn_font))

    # White over grey, premultiplied: Pillow's own drawing on a transparent canvas would darken the edges twice.
    outline = around * (1 - inside)
    colour = 255 * inside + OUTLINE_GREY * outline
    alpha = 255 * (inside + outline)
    channels = np.stack([colour, colour, colour, alpha], axis=-1)
    mark = Image.frombytes("RGBa", size, np.rint(channels).astype(np.uint8).tobytes())
    mark.thumbnail(limit, Image.Resampling.LANCZOS)
    return mark


def _largest_font_px(text: str, font: Path, box: tuple[int, int], *, low: int, high: int) -> int:
    """Return the largest size in [low, high] whose ink fits into `box`, or `low`: width grows with the size."""
    while low < high:
        middle = (low + high + 1) // 2
        left, top, right, bottom = _ink_box(text, ImageFont.truetype(font, middle))
        if right - left <= box[0] and bottom - top <= box[1]:
            low = middle
        else:
            high = middle - 1
    return low


def _coverage(
    text: str, font: ImageFont.FreeTypeFont, size: tuple[int, int], origin: tuple[int, int], *, outline_px: int
) -> NDArray[np.float32]:
    """Return the text's ink, grown by `outline_px`, as (height, width) between 0 and 1."""
    canvas = Image.new("L", size)
    ImageDraw.Draw(canvas).text(origin, text, fill=255, font=font, stroke_width=outline_px)
    return np.asarray(canvas, dtype=np.float32) / np.float32(255)


def _ink_box(text: str, font: ImageFont.FreeTypeFont) -> tuple[int, int, int, int]:
    left, top, right, bottom = font.getbbox(text, stroke_width=_outline_px(font))
    return int(left), int(top), int(right), int(bottom)


def _outline_px(font: ImageFont.FreeTypeFont) -> int:
    return max(1, round(font.size * OUTLINE_PER_FONT_PX))
