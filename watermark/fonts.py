"""Finds a font that really has every character of a text, so that nobody signs with empty boxes."""

import struct
from array import array
from bisect import bisect_left
from functools import lru_cache
from pathlib import Path

from fontTools.ttLib import TTFont, TTLibError

from watermark.errors import FontMissing

# Clear at small sizes, and the first three with Hangul; by file name without its ending.
PREFERRED_FONTS = (
    "NanumGothic",
    "NotoSansCJK-Regular",
    "NotoSansKR-Regular",
    "DejaVuSans",
    "LiberationSans-Regular",
)
FONT_SUFFIXES = {".ttf", ".otf", ".ttc"}


def find_font(text: str, font_dirs: tuple[Path, ...]) -> Path:
    """Return the first font under `font_dirs` with a glyph for every character of `text`, the preferred ones first.

    Raises `FontMissing`, naming the characters the nearest font lacks. Folders and fonts are read once a process.
    """
    wanted = frozenset(ord(character) for character in text if not character.isspace())
    nearest = wanted
    for font in _list_fonts(font_dirs):
        missing = _missing(wanted, _code_points(font))
        if not missing:
            return font
        nearest = min(nearest, missing, key=len)

    folders = ", ".join(map(str, font_dirs))
    raise FontMissing(f"no font in {folders} can write {' '.join(map(_name, sorted(nearest)))}")


@lru_cache(maxsize=8)
def _list_fonts(font_dirs: tuple[Path, ...]) -> tuple[Path, ...]:
    found = {path for folder in font_dirs for path in folder.rglob("*") if path.suffix.lower() in FONT_SUFFIXES}
    return tuple(sorted(found, key=_preference))


def _preference(font: Path) -> tuple[int, str]:
    rank = PREFERRED_FONTS.index(font.stem) if font.stem in PREFERRED_FONTS else len(PREFERRED_FONTS)
    return rank, str(font)


@lru_cache(maxsize=4096)
def _code_points(font: Path) -> "array[int]":
    """The characters a font has, sorted, four bytes each: as sets, those of fifty fonts would take 30 MB."""
    try:
        with TTFont(font, lazy=True, fontNumber=0) as opened:
            return array("I", sorted(opened.getBestCmap() or ()))
    except (TTLibError, OSError, struct.error, AssertionError):
        return array("I")  # a broken font covers nothing; the next one is tried


def _missing(wanted: frozenset[int], covered: "array[int]") -> frozenset[int]:
    places = {code_point: bisect_left(covered, code_point) for code_point in wanted}
    return frozenset(code_point for code_point, at in places.items() if at == len(covered) or covered[at] != code_point)


def _name(code_point: int) -> str:
    return f"{chr(code_point)!r} (U+{code_point:04X})"
