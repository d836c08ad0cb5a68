"""Installed typefaces by family and style, and the choice of one for a text."""

from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

from fontTools.ttLib import TTFont
from fontTools.ttLib.ttCollection import TTCollection

from config.redacting import quoted
from watermark.errors import FontMissing
from watermark.text.fonts import FONT_ERRORS, format_code_points, list_fonts, missing_glyphs, required_code_points
from watermark.text.mark import is_visible
from watermark.text.scripts import Script, detect_script
from watermark.text.shaping import check_shaping

# Readable in headlines, and of the right country: Han glyphs differ between Japan and China.
PREFERRED_FAMILIES = {
    Script.HANGUL: ("NanumSquare", "NanumGothic", "Noto Sans KR", "Noto Sans CJK KR"),
    Script.KANA: ("Noto Sans JP", "Noto Sans CJK JP", "IPAexGothic", "VL PGothic"),
    Script.HAN: ("Noto Sans SC", "Noto Sans CJK SC", "WenQuanYi Micro Hei"),
    Script.LATIN: ("DejaVu Sans", "Noto Sans", "Liberation Sans"),
}
REGULAR_WEIGHT, BOLD_WEIGHT = 400, 700
NUM_NEAR_FAMILIES = 3
MIN_SIMILARITY = 0.4

# Name IDs of the `name` table: typographic names where a family has more than four styles, else the plain ones.
TYPOGRAPHIC_FAMILY, TYPOGRAPHIC_STYLE, FAMILY, STYLE, FULL = 16, 17, 1, 2, 4
ENGLISH = 0x409
ITALIC = 1 << 1

# Letters to Unicode, blank in every correct font.
FILLERS = frozenset((0x115F, 0x1160, 0x3164, 0xFFA0))


@dataclass(frozen=True, slots=True)
class Typeface:
    """One face of a font file: `index` is its number in a collection. English names come first."""

    path: Path
    index: int
    families: tuple[str, ...]
    style: str
    full_names: tuple[str, ...]
    weight: int
    is_italic: bool

    @property
    def family(self) -> str:
        return self.families[0]

    def matches(self, key: str) -> bool:
        """Return whether `key` names this face, by its full name or by family and style."""
        # "Regular" also where the foundry calls it Book or Roman.
        is_regular = self.weight == REGULAR_WEIGHT and not self.is_italic
        styles = {self.style, "Regular"} if is_regular else {self.style}
        names = {*self.full_names, *(f"{family} {style}" for family in self.families for style in styles)}
        return key in map(_normalize, names)


def choose_typeface(text: str, family: str | None, font_dirs: tuple[Path, ...]) -> Typeface:
    """Choose the face of `family`, regular unless the name ends in a style ("Nanum Gothic Bold"), or any that fits.

    It has every character of `text`. Without a family, faces preferred for the text's script and bold ones come first.
    Raises `FontMissing`, naming the missing characters, or the most similar families for an unknown name, or
    `ShapingMissing`.
    """
    check_shaping(text)
    if family is None:
        return _find_covering(text, font_dirs)
    face = _find_by_name(family, font_dirs)
    if missing := _missing(text, face):
        raise FontMissing(f"the font {family} ({face.path.name}) cannot write {format_code_points(missing)}")
    return face


@lru_cache(maxsize=8)
def list_typefaces(font_dirs: tuple[Path, ...]) -> tuple[Typeface, ...]:
    """List every named face under `font_dirs`, read once per process; symbolic links count once."""
    files = dict.fromkeys(path.resolve() for path in list_fonts(font_dirs))
    return tuple(face for path in sorted(files) for face in _faces(path))


def _find_covering(text: str, font_dirs: tuple[Path, ...]) -> Typeface:
    ranks = {family: rank for rank, family in enumerate(PREFERRED_FAMILIES[detect_script(text)])}
    faces = sorted(
        list_typefaces(font_dirs),
        key=lambda face: (ranks.get(face.family, len(ranks)), face.is_italic, abs(face.weight - BOLD_WEIGHT)),
    )
    nearest = required_code_points(text)
    for face in faces:
        missing = _missing(text, face)
        if not missing:
            return face
        nearest = min(nearest, missing, key=len)
    raise FontMissing(f"no font in {', '.join(map(str, font_dirs))} can write {format_code_points(nearest)}")


def _find_by_name(name: str, font_dirs: tuple[Path, ...]) -> Typeface:
    faces, key = list_typefaces(font_dirs), _normalize(name)
    of_family = [face for face in faces if key in map(_normalize, face.families)] or [
        face for face in faces if face.matches(key)
    ]
    if not of_family:
        names = {_normalize(family): family for face in faces for family in reversed(face.families)}
        near = get_close_matches(key, names, NUM_NEAR_FAMILIES, MIN_SIMILARITY)
        suggested = f"; near it are {', '.join(names[found] for found in near)}" if near else ""
        raise FontMissing(f"no font family {quoted(name)} is installed{suggested}; `darkroom fonts` lists them")
    return min(of_family, key=lambda face: (face.is_italic, abs(face.weight - REGULAR_WEIGHT)))


def _missing(text: str, face: Typeface) -> frozenset[int]:
    """Return the characters without a glyph, else those that the font draws blank, as NanumSquare does U+D7A3."""
    wanted = required_code_points(text)
    missing = missing_glyphs(face.path, wanted, face.index)
    if missing:
        return missing
    return frozenset(one for one in wanted - FILLERS if not is_visible(chr(one), face.path, face.index))


def _normalize(name: str) -> str:
    """Normalize a name for comparison: "Nanum Gothic" equals "NanumGothic"."""
    return "".join(name.casefold().split()).replace("-", "")


def _faces(path: Path) -> list[Typeface]:
    try:
        if path.suffix.lower() != ".ttc":
            with TTFont(path, lazy=True) as font:
                return _face(path, 0, font)
        with TTCollection(path, lazy=True) as collection:
            return [face for index, font in enumerate(collection.fonts) for face in _face(path, index, font)]
    except FONT_ERRORS:
        return []  # a broken font, or one without a table of names


def _face(path: Path, index: int, font: TTFont) -> list[Typeface]:
    """Read one face; an empty list where it has no name."""
    families = (*_names(font, TYPOGRAPHIC_FAMILY), *_names(font, FAMILY))
    if not families:
        return []
    styles = (*_names(font, TYPOGRAPHIC_STYLE), *_names(font, STYLE), "Regular")
    weight = font["OS/2"].usWeightClass if "OS/2" in font else REGULAR_WEIGHT
    is_italic = bool(font["head"].macStyle & ITALIC)
    unique = tuple(dict.fromkeys(families))
    return [Typeface(path, index, unique, styles[0], _names(font, FULL), weight, is_italic)]


def _names(font: TTFont, name_id: int) -> tuple[str, ...]:
    """Return the `name` table's entries for `name_id` in every language, English first."""
    records = [record for record in font["name"].names if record.nameID == name_id and record.platformID in {0, 3}]
    records = records or [record for record in font["name"].names if record.nameID == name_id]
    ordered = sorted(records, key=lambda record: record.langID != ENGLISH)
    return tuple(dict.fromkeys(str(record.toUnicode(errors="replace")) for record in ordered))
