"""Scripts that join, stack or run from right to left: drawn as they are written, or refused where nothing here can."""

import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fontTools.feaLib.builder import addOpenTypeFeaturesFromString
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tests.support.paths import ROOT
from watermark.errors import FontMissing, OverlayInvalid, SignatureInvalid
from watermark.signature import TextSignature
from watermark.text.fonts import find_font
from watermark.text.headline import draw_headlines, prepare_headline
from watermark.text.mark import clean_lines, clean_text, draw_text
from watermark.text.overlay import TextOverlay
from watermark.text.shaping import LRM, RLM, keep_direction, needs_shaping
from watermark.text.wrapping import Breaking, wrap
from worker.cli.check.files import check_shaping

FONT_DIRS = (Path("/usr/share/fonts"),)
ROOM = (600, 200)
SIMPLE = (
    "Ann",
    "Ünal Ñ",
    "서울 아틀리에",
    "ひらがなカタカナ",
    "漢字",
    "Ελληνικά",
    "Кириллица",
    "Հայերեն",
    "ქართული",
    "50 % — €",
)
COMPLEX = {
    "Hebrew": "שלום",
    "Arabic": "محمد",
    "Persian with a joiner": "می\u200cخواهم",
    "Syriac": "ܫܠܡܐ",
    "N'Ko": "ߒߞߏ",
    "Devanagari": "नमस्ते",
    "Bengali": "বাংলা",
    "Tamil": "தமிழ்",
    "Sinhala": "සිංහල",
    "Thai": "สวัสดี",
    "Lao": "ລາວ",
    "Tibetan": "བོད",
    "Myanmar": "မြန်မာ",
    "Khmer": "ខ្មែរ",
    "Mongolian": "ᠮᠣᠩᠭᠣᠯ",
    "Mongolian with its vowel separator": "ᠬᠠᠯᠠ\u180eᠠ",
    "Javanese": "ꦗꦮ",
    "Adlam": "𞤀𞤣",
    "old Hangul": "\u1112\u119e\u11ab",
    "presentation forms": "ﷺ",
    "a letter under two marks": "x\u0323\u0301",
    "a variant of a Han sign": "葛\U000e0100",
    "Latin with a joiner": "Ann\u200dB",
    "a Hebrew word in Latin": "Ann שלום",
}


def ink(image: Image.Image) -> NDArray[Any]:
    """Return where a mark of white letters with an outline is white."""
    return np.asarray(np.asarray(image.convert("RGBA").getchannel("R")) > 128)


def mark(text: str) -> Image.Image:
    return draw_text(text, find_font(text, FONT_DIRS), fit=ROOM, limit=ROOM)


def gaps(text: str) -> int:
    """Count the blank columns that part the letters."""
    columns = np.asarray(ink(mark(text)).any(axis=0))
    starts = np.flatnonzero(columns[1:] & ~columns[:-1])
    return len(starts)


# --- drawn


def test_hebrew_runs_from_right_to_left() -> None:
    text = "שלום"
    font_path = find_font(text, FONT_DIRS)
    white = Image.fromarray(ink(mark(text)))
    drawn = np.asarray(white.crop(white.getbbox()))
    # One glyph a character is right for Hebrew if the characters are given from left to right.
    font = ImageFont.truetype(font_path, 100, layout_engine=ImageFont.Layout.BASIC)
    canvas = Image.new("L", (600, 200))
    ImageDraw.Draw(canvas).text((20, 20), text[::-1], fill=255, font=font)
    expected = np.asarray(canvas.crop(canvas.getbbox()).resize(drawn.shape[::-1])) > 128

    assert (drawn == expected).mean() > 0.9
    assert (drawn[:, ::-1] == expected).mean() < 0.8


def test_arabic_letters_join() -> None:
    assert gaps("محمد") == gaps("م")
    assert gaps(" ".join("محمد")) == gaps("م") + 3


def test_a_joiner_is_spelling() -> None:
    joined, parted = "میخواهم", "می\u200cخواهم"
    assert gaps(parted) == gaps(joined) + 1
    assert mark(joined).tobytes() != mark(parted).tobytes()


@pytest.mark.parametrize("text", [COMPLEX["Persian with a joiner"], "שלום", "Ann\u200dB"])
def test_names_and_headlines_take_joiners_and_both_directions(text: str) -> None:
    assert TextSignature(text, FONT_DIRS).text == text
    headline = prepare_headline(TextOverlay(text), FONT_DIRS)
    drawn = draw_headlines(Image.new("RGB", (256, 256), (60, 80, 110)), [headline])
    assert len(drawn.getcolors(maxcolors=100_000) or ()) > 10


# --- lines


@pytest.mark.parametrize(
    ("line", "part", "drawn"),
    [
        ("שלום Ann", "Ann!", f"{RLM}Ann!"),
        ("Ann שלום", "שלום!", f"{LRM}שלום!"),
        ("Ann שלום", "Ann!", "Ann!"),
        ("שלום 50", "50 %", f"{RLM}50 %"),
        ("Sale 50 %", "50 %", "50 %"),
        ("50 %", "50 %", "50 %"),
    ],
)
def test_a_broken_line_runs_as_the_whole_does(line: str, part: str, drawn: str) -> None:
    assert keep_direction(line, part) == drawn


@pytest.mark.parametrize(
    ("text", "signs"),
    [
        ("क्षि", ["क्षि"]),
        ("नमस्ते", ["न", "म", "स्ते"]),
        ("ক্\u200dষ", ["ক্\u200dষ"]),
        ("葛\U000e0100x", ["葛\U000e0100", "x"]),
        ("می\u200cخ", ["م", "ی\u200c", "خ"]),
    ],
)
def test_a_word_is_broken_between_the_signs_of_its_script(text: str, signs: list[str]) -> None:
    assert wrap(text, 0.5, lambda piece: float(bool(piece.strip())), Breaking.ALL) == signs


# --- characters


@pytest.mark.parametrize("text", ["a\u00adb", "a\u200bb", "a\u2060b", "\ufeffab"])
def test_hints_where_lines_break_are_left_out(text: str) -> None:
    assert clean_text(text) == "ab"
    assert clean_lines(text) == ("ab",)


REFUSED = (*map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFFF9, 0xE0041)), "\x1b", "\u206a")


@pytest.mark.parametrize("char", REFUSED)
def test_characters_that_forge_a_text_are_refused_in_any_script(char: str) -> None:
    for text in (f"Ann{char}B", f"שלום{char}ם"):
        with pytest.raises(SignatureInvalid, match=f"U\\+{ord(char):04X}"):
            clean_text(text)
        with pytest.raises(OverlayInvalid, match=f"U\\+{ord(char):04X}"):
            clean_lines(text)


@pytest.mark.parametrize("text", ["\u200d", "\u200c\u200d", "\u200f", "\ufe0f", " \U000e0100\u034f"])
def test_joiners_and_selectors_alone_are_no_name(text: str) -> None:
    with pytest.raises(SignatureInvalid, match=r"no visible character|is empty"):
        TextSignature(text, FONT_DIRS)
    with pytest.raises(OverlayInvalid, match=r"no visible character|is empty"):
        prepare_headline(TextOverlay(text), FONT_DIRS)


def test_the_vowel_separator_of_mongolian_is_spelling() -> None:
    text = COMPLEX["Mongolian with its vowel separator"]
    assert (clean_text(text), clean_lines(text)) == (text, (text,))


def test_selectors_that_select_nothing_are_left_out() -> None:
    assert clean_text("\ufe0fa\ufe0f \ufe0eb\u034f") == "a\ufe0f b\u034f"


def test_shaping_is_needed_for_complex_scripts_alone() -> None:
    assert not [text for text in SIMPLE if needs_shaping(unicodedata.normalize("NFC", text))]
    assert not [name for name, text in COMPLEX.items() if not needs_shaping(text)]


# --- fonts


def square(width: int, height: int) -> Callable[[], object]:
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, height), (width, height), (width, 0)):
        pen.lineTo(point)
    pen.closePath()
    return pen.glyph  # type: ignore[no-any-return]


def write_devanagari(path: Path, features: str) -> Path:
    """Write a font of क, ष, the virama and their ligature, as rectangles; `features` substitute them."""
    builder = FontBuilder(1000, isTTF=True)
    sizes = {".notdef": (100, 100), "ka": (300, 300), "ssa": (300, 300), "virama": (100, 100), "kssa": (300, 900)}
    builder.setupGlyphOrder(list(sizes))
    builder.setupCharacterMap({0x915: "ka", 0x937: "ssa", 0x94D: "virama"})
    builder.setupGlyf({name: square(*size)() for name, size in sizes.items()})
    builder.setupHorizontalMetrics({name: (width + 50, 0) for name, (width, _) in sizes.items()})
    builder.setupHorizontalHeader(ascent=1000, descent=-200)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    if features:
        addOpenTypeFeaturesFromString(builder.font, features)
    builder.save(path)
    return path


LIGATURE = "languagesystem dev2 dflt; feature akhn { script dev2; sub ka virama ssa by kssa; } akhn;"


def test_font_that_has_the_letters_alone_of_a_script_that_stacks_cannot_write_it(tmp_path: Path) -> None:
    write_devanagari(tmp_path / "squares.ttf", "")
    for write in (
        lambda: TextSignature("क्ष", (tmp_path,)),
        lambda: prepare_headline(TextOverlay("क्ष"), (tmp_path,)),
        lambda: prepare_headline(TextOverlay("क्ष", font="Squares"), (tmp_path,)),
    ):
        with pytest.raises(FontMissing, match=r"cannot write|can write 'क' \(U\+0915\)"):
            write()


def test_font_that_stacks_the_letters_writes_them_stacked(tmp_path: Path) -> None:
    font = write_devanagari(tmp_path / "squares.ttf", LIGATURE)
    assert TextSignature("क्ष", (tmp_path,)).font == font
    height, width = ink(draw_text("क्ष", font, fit=ROOM, limit=ROOM)).shape
    assert height > 2 * width


# --- without fribidi

CHILD = """
import json, sys
from pathlib import Path
from watermark.text.headline import prepare_headlines
from watermark.text.overlay import TextOverlay
from watermark.signature import TextSignature
from worker.cli.check.checks import CheckFailed
from worker.cli.check.files import check_shaping

def said(make):
    try:
        make()
    except Exception as error:
        return f"{type(error).__mro__[1].__name__}: {error}"
    return "drawn"

fonts = (Path("/usr/share/fonts"),)
texts = json.load(sys.stdin)
print(json.dumps({
    "names": [said(lambda: TextSignature(text, fonts)) for text in texts],
    "headlines": [said(lambda: prepare_headlines((TextOverlay(text),), fonts)) for text in texts],
    "check": said(check_shaping),
}))
"""


@pytest.fixture(scope="module")
def without_fribidi(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str] | str]:
    """Check every text in a process whose loader meets a broken libfribidi before the system's."""
    folder = tmp_path_factory.mktemp("lib")
    for name in ("libfribidi.so", "libfribidi.so.0"):
        (folder / name).touch()
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        cwd=ROOT,
        env=os.environ | {"LD_LIBRARY_PATH": str(folder)},
        input=json.dumps([*SIMPLE, *COMPLEX.values()]),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["names", "headlines"])
def test_text_that_needs_fribidi_is_refused_without_it(kind: str, without_fribidi: dict[str, list[str]]) -> None:
    said = without_fribidi[kind]
    assert said[: len(SIMPLE)] == ["drawn"] * len(SIMPLE)
    refusals = dict(zip(COMPLEX, said[len(SIMPLE) :], strict=True))
    field = "text_overlay: " if kind == "headlines" else ""
    assert {name: text.partition("(")[0] for name, text in refusals.items()} == dict.fromkeys(
        COMPLEX, f"FontMissing: {field}the text has letters that join or run from right to left "
    )
    assert "U+05DC" in refusals["Hebrew"]


def test_check_names_missing_and_present_libraries(without_fribidi: dict[str, str]) -> None:
    assert "libfribidi0" in without_fribidi["check"]
    assert "fribidi 1." in check_shaping()


def test_the_image_and_the_tests_bring_fribidi() -> None:
    for file in ("Dockerfile", "Makefile"):
        assert " libfribidi0 " in " ".join((ROOT / file).read_text().split())
