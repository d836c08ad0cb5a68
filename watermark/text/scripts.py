"""The scripts that headlines are written in."""

from array import array
from bisect import bisect_left
from enum import StrEnum


class Script(StrEnum):
    """A script that needs fonts of its own."""

    LATIN = "Latin"
    HANGUL = "Hangul"
    KANA = "Kana"
    HAN = "Han"


# First and last code points of each script's letters.
RANGES = {
    Script.LATIN: ((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F)),
    Script.HANGUL: ((0xAC00, 0xD7A3),),
    Script.KANA: ((0x3041, 0x3096), (0x30A1, 0x30FA)),
    Script.HAN: ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0x20000, 0x3FFFF)),
}
# Number of letters from which a font covers a script: the alphabet, KS X 1001's syllables, both Kana, newspaper Han.
MIN_LETTERS = {Script.LATIN: 52, Script.HANGUL: 2350, Script.KANA: 160, Script.HAN: 2000}


def detect_script(text: str) -> Script:
    """Return the script that decides a text's language: Hangul is Korean, Kana Japanese, Han alone Chinese."""
    letters = array("I", sorted(map(ord, text)))
    return next(
        (script for script in (Script.HANGUL, Script.KANA, Script.HAN) if _count(letters, script)), Script.LATIN
    )


def covered_scripts(code_points: "array[int]") -> dict[Script, int]:
    """Return the scripts that these sorted characters cover, with the number of letters of each."""
    counts = {script: _count(code_points, script) for script in Script}
    return {script: count for script, count in counts.items() if count >= MIN_LETTERS[script]}


def _count(code_points: "array[int]", script: Script) -> int:
    return sum(bisect_left(code_points, last + 1) - bisect_left(code_points, first) for first, last in RANGES[script])
