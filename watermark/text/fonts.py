"""Find a font that has a glyph for every character of a text."""

import struct
from array import array
from bisect import bisect_left
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from fontTools.ttLib import TTFont, TTLibError

from watermark.errors import FontMissing
from watermark.text.shaping import check_shaping, is_ignorable, unshaped_code_points

# Readable at small sizes, the first three with Hangul; file names without suffix.
PREFERRED_FONTS = (
    "NanumGothic",
    "NotoSansCJK-Regular",
    "NotoSansKR-Regular",
    "DejaVuSans",
    "LiberationSans-Regular",
)
FONT_SUFFIXES = {".ttf", ".otf", ".ttc"}
OUTLINES = {"glyf", "CFF ", "CFF2"}
# Tables of colour glyphs, as for emoji: those are not drawn.
COLOURED = {"CBDT", "COLR", "SVG ", "sbix"}
# What fontTools raises for broken files; a missing table is a KeyError.
FONT_ERRORS = (TTLibError, OSError, struct.error, AssertionError, KeyError)


def find_font(text: str, font_dirs: tuple[Path, ...]) -> Path:
    """Return the first font under `font_dirs` that has every character of `text`, preferred fonts first.

    Raises `FontMissing`, naming the characters missing from the nearest font, or `ShapingMissing`. Folders and fonts
    are read once per process.
    """
    check_shaping(text)
    wanted = required_code_points(text)
    nearest = wanted
    for font in list_fonts(font_dirs):
        missing = missing_glyphs(font, wanted)
        if not missing:
            return font
        nearest = min(nearest, missing, key=len)

    folders = ", ".join(map(str, font_dirs))
    raise FontMissing(f"no font in {folders} can write {format_code_points(nearest)}")


def required_code_points(text: str) -> frozenset[int]:
    """Return the code points of `text` that need a glyph."""
    return frozenset(ord(char) for char in text if not char.isspace() and not is_ignorable(char))


def format_code_points(code_points: Iterable[int]) -> str:
    """Format characters as literals with their code points."""
    return " ".join(f"{chr(code_point)!r} (U+{code_point:04X})" for code_point in sorted(code_points))


@lru_cache(maxsize=8)
def list_fonts(font_dirs: tuple[Path, ...]) -> tuple[Path, ...]:
    """List the font files under `font_dirs`, preferred fonts first."""
    found = {path for folder in font_dirs for path in folder.rglob("*") if path.suffix.lower() in FONT_SUFFIXES}
    ranks = {stem: rank for rank, stem in enumerate(PREFERRED_FONTS)}
    return tuple(sorted(found, key=lambda font: (ranks.get(font.stem, len(ranks)), str(font))))


@lru_cache(maxsize=4096)
def code_points(font: Path, index: int = 0) -> "array[int]":
    """Return a face's characters, sorted, four bytes each: as sets, those of fifty fonts would take 30 MB."""
    try:
        with TTFont(font, lazy=True, fontNumber=index) as opened:
            is_drawn = OUTLINES & set(opened.keys()) and not COLOURED & set(opened.keys())
            return array("I", sorted(opened.getBestCmap() or ()) if is_drawn else ())
    except FONT_ERRORS:
        return array("I")  # a broken font covers nothing; the next one is tried


@lru_cache(maxsize=4096)
def shaped_scripts(font: Path, index: int = 0) -> frozenset[str]:
    """Return the OpenType script tags in a face's GSUB and GPOS tables."""
    try:
        with TTFont(font, lazy=True, fontNumber=index) as opened:
            lists = [opened[table].table.ScriptList for table in ("GSUB", "GPOS") if table in opened]
            return frozenset(record.ScriptTag for one in lists if one for record in one.ScriptRecord)
    except FONT_ERRORS:
        return frozenset()


def missing_glyphs(font: Path, wanted: frozenset[int], index: int = 0) -> frozenset[int]:
    """Return those of `wanted` for which a face has no glyph, or no shaping where the script needs it."""
    covered = code_points(font, index)
    places = {code_point: bisect_left(covered, code_point) for code_point in wanted}
    missing = (code_point for code_point, at in places.items() if at == len(covered) or covered[at] != code_point)
    return frozenset(missing) | unshaped_code_points(wanted, shaped_scripts(font, index))
