"""Finds a font that really has every character of a text, so that nobody signs with empty boxes."""

import struct
from array import array
from bisect import bisect_left
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from fontTools.ttLib import TTFont, TTLibError

from watermark.errors import FontMissing
from watermark.text.shaping import check_shaping, is_ignorable, unshaped_code_points

# Clear at small sizes, and the first three with Hangul; by file name without its ending.
PREFERRED_FONTS = (
    "NanumGothic",
    "NotoSansCJK-Regular",
    "NotoSansKR-Regular",
    "DejaVuSans",
    "LiberationSans-Regular",
)
FONT_SUFFIXES = {".ttf", ".otf", ".ttc"}
OUTLINES = {"glyf", "CFF ", "CFF2"}
# Glyphs in colours of their own, as emoji have: they are not drawn.
COLOURED = {"CBDT", "COLR", "SVG ", "sbix"}
# What fontTools lets through on broken files; a missing table is a missing key.
FONT_ERRORS = (TTLibError, OSError, struct.error, AssertionError, KeyError)


def find_font(text: str, font_dirs: tuple[Path, ...]) -> Path:
    """Return the first font under `font_dirs` that can write every character of `text`, the preferred ones first.

    Raises `FontMissing`, naming the characters the nearest font lacks, or `ShapingMissing`. Folders and fonts are read
    once a process.
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
    """The code points of `text` that need a glyph."""
    return frozenset(ord(char) for char in text if not char.isspace() and not is_ignorable(char))


def format_code_points(code_points: Iterable[int]) -> str:
    """Characters as a person and a machine read them."""
    return " ".join(f"{chr(code_point)!r} (U+{code_point:04X})" for code_point in sorted(code_points))


@lru_cache(maxsize=8)
def list_fonts(font_dirs: tuple[Path, ...]) -> tuple[Path, ...]:
    """The font files under `font_dirs`, the preferred ones first."""
    found = {path for folder in font_dirs for path in folder.rglob("*") if path.suffix.lower() in FONT_SUFFIXES}
    return tuple(sorted(found, key=_preference))


def _preference(font: Path) -> tuple[int, str]:
    rank = PREFERRED_FONTS.index(font.stem) if font.stem in PREFERRED_FONTS else len(PREFERRED_FONTS)
    return rank, str(font)


@lru_cache(maxsize=4096)
def code_points(font: Path, index: int = 0) -> "array[int]":
    """The characters a face has, sorted, four bytes each: as sets, those of fifty fonts would take 30 MB."""
    try:
        with TTFont(font, lazy=True, fontNumber=index) as opened:
            is_drawn = OUTLINES & set(opened.keys()) and not COLOURED & set(opened.keys())
            return array("I", sorted(opened.getBestCmap() or ()) if is_drawn else ())
    except FONT_ERRORS:
        return array("I")  # a broken font covers nothing; the next one is tried


@lru_cache(maxsize=4096)
def shaped_scripts(font: Path, index: int = 0) -> frozenset[str]:
    """The OpenType tags of the scripts whose letters a face joins, stacks or places."""
    try:
        with TTFont(font, lazy=True, fontNumber=index) as opened:
            lists = [opened[table].table.ScriptList for table in ("GSUB", "GPOS") if table in opened]
            return frozenset(record.ScriptTag for one in lists if one for record in one.ScriptRecord)
    except FONT_ERRORS:
        return frozenset()


def missing_glyphs(font: Path, wanted: frozenset[int], index: int = 0) -> frozenset[int]:
    """Those of `wanted` that a face has no glyph for, or only the bare letters of a script that has to be shaped."""
    return missing_from(code_points(font, index), wanted) | unshaped_code_points(wanted, shaped_scripts(font, index))


def missing_from(covered: "array[int]", wanted: frozenset[int]) -> frozenset[int]:
    """Those of `wanted` that are not among the sorted `covered`."""
    places = {code_point: bisect_left(covered, code_point) for code_point in wanted}
    return frozenset(code_point for code_point, at in places.items() if at == len(covered) or covered[at] != code_point)
