"""Text shaping: which scripts need it, and whether raqm is available in this process.

Pillow's wheels contain raqm and HarfBuzz, and load fribidi from the system. Without it they silently draw one glyph per
character from left to right.
"""

import unicodedata
from collections.abc import Collection, Iterable

from PIL import features

from watermark.errors import ShapingMissing

ZWNJ, ZWJ, LRM, RLM = "\u200c", "\u200d", "\u200e", "\u200f"
GRAPHEME_JOINER = "\u034f"
MONGOLIAN_VOWEL_SEPARATOR = "\u180e"
# Format characters that are part of a text's spelling or order; overrides and isolates, which forge names, are not.
SPELLING = frozenset({ZWNJ, ZWJ, LRM, RLM, "\u061c", MONGOLIAN_VOWEL_SEPARATOR})
# Signs that enclose or precede digits: format characters to Unicode, and drawn (its Prepended_Concatenation_Mark).
ENCLOSING = frozenset(map(chr, (*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD)))
# Prefixes of their Unicode names.
VARIATION_SELECTORS = ("VARIATION SELECTOR-", "MONGOLIAN FREE VARIATION SELECTOR")
# Line-break hints: invisible.
HINTS = frozenset("\u00ad\u200b\u2060\ufeff")

# Blocks in which one glyph a character is wrong: Hebrew to Myanmar, old Hangul, Tagalog to Mongolian, Limbu to Vedic, …
COMPLEX_BLOCKS = (
    *((0x0590, 0x109F), (0x1100, 0x11FF), (0x1700, 0x18AF), (0x1900, 0x1CFF), (0xA800, 0xAAFF), (0xABC0, 0xABFF)),
    *((0xD7B0, 0xD7FF), (0xFB1D, 0xFDFF), (0xFE70, 0xFEFE), (0x10800, 0x11FFF), (0x1E800, 0x1EFFF)),
)
MARKS = frozenset({"Mn", "Mc", "Me"})
RIGHT_TO_LEFT = frozenset({"R", "AL"})
# Scripts that a font must declare by an OpenType tag, old or new: its bare letters would be unreadable. The ranges are
# disjoint.
SHAPED_SCRIPTS = (
    ((0x0600, 0x06FF), ("arab",)),
    ((0x0700, 0x074F), ("syrc",)),
    ((0x0750, 0x077F), ("arab",)),
    ((0x08A0, 0x08FF), ("arab",)),
    ((0x0900, 0x097F), ("deva", "dev2", "dev3")),
    ((0x0980, 0x09FF), ("beng", "bng2", "bng3")),
    ((0x0A00, 0x0A7F), ("guru", "gur2", "gur3")),
    ((0x0A80, 0x0AFF), ("gujr", "gjr2", "gjr3")),
    ((0x0B00, 0x0B7F), ("orya", "ory2", "ory3")),
    ((0x0B80, 0x0BFF), ("taml", "tml2", "tml3")),
    ((0x0C00, 0x0C7F), ("telu", "tel2", "tel3")),
    ((0x0C80, 0x0CFF), ("knda", "knd2", "knd3")),
    ((0x0D00, 0x0D7F), ("mlym", "mlm2", "mlm3")),
    ((0x0D80, 0x0DFF), ("sinh",)),
    ((0x0F00, 0x0FFF), ("tibt",)),
    ((0x1000, 0x109F), ("mymr", "mym2")),
    ((0x1780, 0x17FF), ("khmr",)),
)


def is_shaping_here() -> bool:
    """Return whether raqm works in this process; it needs fribidi."""
    return bool(features.check("raqm"))


def check_shaping(text: str) -> None:
    """Raise `ShapingMissing` where this process would draw `text` unshaped."""
    if not is_shaping_here() and (complex_ones := [char for char in text if needs_shaping(char)]):
        shown = " ".join(sorted({f"U+{ord(char):04X}" for char in complex_ones})[:5])
        raise ShapingMissing(
            f"the text has letters that join or run from right to left ({shown}), which this worker cannot draw: "
            "libfribidi is missing"
        )


def needs_shaping(text: str) -> bool:
    """Return whether one glyph per character, from left to right, is wrong for `text`."""
    return any(
        is_ignorable(char)
        or unicodedata.category(char) in MARKS
        or unicodedata.bidirectional(char) in RIGHT_TO_LEFT
        or any(first <= ord(char) <= last for first, last in COMPLEX_BLOCKS)
        for char in text
    )


def is_ignorable(char: str) -> bool:
    """Return whether a character needs no glyph: joiners, directional marks and variation selectors."""
    return char in SPELLING or _is_selector(char)


def without_hints(text: str) -> str:
    """Remove line-break hints and stray variation selectors, which would be drawn."""
    kept: list[str] = []
    for char in text:
        is_stray = _is_selector(char) and (not kept or kept[-1].isspace())
        if char not in HINTS and not is_stray:
            kept.append(char)
    return "".join(kept)


def _is_selector(char: str) -> bool:
    return char == GRAPHEME_JOINER or unicodedata.name(char, "").startswith(VARIATION_SELECTORS)


def unshaped_code_points(code_points: Iterable[int], tags: Collection[str]) -> frozenset[int]:
    """Return the letters that a font would draw unshaped; `tags` are the scripts that it shapes."""
    letters = [one for one in code_points if unicodedata.category(chr(one))[0] in "LM"]
    return frozenset(
        letter
        for letter in letters
        for (first, last), wanted in SHAPED_SCRIPTS
        if first <= letter <= last and not any(tag in tags for tag in wanted)
    )


def keep_direction(line: str, part: str) -> str:
    """Prefix `part` of `line` with a mark where it would otherwise lose the line's base direction (UAX #9, P2)."""
    is_line_rtl = bool(_is_right_to_left(line))
    if bool(_is_right_to_left(part)) is is_line_rtl:
        return part
    return (RLM if is_line_rtl else LRM) + part


def _is_right_to_left(text: str) -> bool | None:
    """Return whether the first strong character is right-to-left; None where there is none."""
    kinds = (unicodedata.bidirectional(char) for char in text)
    return next((kind in RIGHT_TO_LEFT for kind in kinds if kind == "L" or kind in RIGHT_TO_LEFT), None)
