"""Line breaking by the rules of each script. Pure: the caller passes the measure."""

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from enum import IntEnum
from itertools import accumulate, pairwise
from typing import NamedTuple

from watermark.text.shaping import MARKS, ZWJ, is_ignorable

# Han, Kana and related blocks: lines may break between any two. Hangul is not among them: words stay whole.
IDEOGRAPHIC = (
    r"\u2e80-\u2fdf\u3003-\u3007\u3012\u3013\u3020-\u302d\u3031-\u312f\u31a0-\u31ff\u3220-\u33ff\u3400-\u4dbf"
    r"\u4e00-\ua4cf\uf900-\ufaff\uff10-\uff19\uff21-\uff3a\uff41-\uff5a\uff66-\uff9d\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
# Canonical combining class of viramas, which join consonants of Indic scripts.
VIRAMA_CLASS = 9
_HANGUL = r"\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff\uffa0-\uffdc"
# Kinsoku shori (JIS X 4051, as in JLREQ): what must not begin a line, and what must not end one.
NOT_FIRST = frozenset(
    "、。，．,.・：；:;！？!?)）]］}｝〉》」』】〕〗〙〟’”»›…‥—–〜～ー゠ヽヾゝゞ々〻"
    "ぁぃぅぇぉっゃゅょゎゕゖァィゥェォッャュョヮヵヶㇰㇱㇲㇳㇴㇵㇶㇷㇸㇹㇺㇻㇼㇽㇾㇿ％%‰℃°｡｣､･ｰﾞﾟ"
)
NOT_LAST = frozenset("(（[［{｛〈《「『【〔〖〘〝‘“«‹｢￥＄¥$£€#＃№")
_IS_IDEOGRAPHIC = re.compile(f"[{IDEOGRAPHIC}]")
_IS_HANGUL = re.compile(f"[{_HANGUL}]")
_KATAKANA = r"\u30a1-\u30ff\u31f0-\u31ff\uff66-\uff9d"
_IS_KATAKANA = re.compile(f"[{_KATAKANA}]")
_HAS_SYLLABLES = re.compile(f"[{_HANGUL}{_KATAKANA}]")
_IS_HIRAGANA = re.compile(r"[\u3041-\u309f]")

# Cost of a break inside a possible word, as a fraction of an empty line: highest between Han or inside Hiragana, lower
# at either end of Katakana (foreign words), lowest after Hiragana, where most Japanese phrases end. Tuned by eye.
PHRASE_GOES_ON = 0.1
WORD_ENDS = 0.03
PHRASE_ENDS = 0.01


class Breaking(IntEnum):
    """Where lines may break; each level includes those before it."""

    PHRASES = 0  # at spaces, at punctuation, where Hiragana ends, and around Katakana
    WORDS = 1  # between any Han and Hiragana
    SYLLABLES = 2  # inside a word of Hangul or Katakana that is wider than the line
    ALL = 3  # inside any word that is wider than the line


class Piece(NamedTuple):
    """An unbreakable piece of text, whether a space follows it, and the cost of a line break after it (0 to 1)."""

    text: str
    is_spaced: bool
    cost: float = 0.0


def split_pieces(line: str) -> list[Piece]:
    """Split `line` into words, and Chinese and Japanese into graphemes, but for Katakana words.

    `line` has single plain spaces. A grapheme that must not begin a line is joined to the one before, and one that must
    not end a line to the next.
    """
    found = []
    for word in line.split(" "):
        parts = _split_at_breaks(word)
        found += [Piece(part, False, _break_cost(part[-1], after[0])) for part, after in pairwise(parts)]
        found.append(Piece(parts[-1], True))
    return found


def wrap(
    line: str, width: float, measure: Callable[[str], float], breaking: Breaking, *, evenly: bool = True
) -> list[str] | None:
    """Wrap `line` into the fewest lines of at most `width`; None where an unbreakable word is wider.

    `measure` returns the width of a text. A single grapheme that is wider gets a line of its own. `evenly` minimizes
    the sum of squared slack and break costs (Knuth and Plass 1981); without it lines are filled greedily, which gives
    as many lines, faster.
    """
    pieces = split_pieces(line)
    if breaking is Breaking.PHRASES:
        pieces = _join_phrases(pieces)
    fitting = _split_wide(pieces, width, measure, breaking)
    if fitting is None:
        return None
    row = _Row(fitting, measure)
    starts = [0]  # of each line, and the end
    while starts[-1] < len(row):
        starts.append(row.reach(starts[-1], width))
    if evenly and len(starts) > 2:
        starts = _balance(row, starts, width)
    return [row.text(start, stop) for start, stop in pairwise(starts)]


class _Row:
    """A sequence of pieces, with the width of any run in O(1)."""

    def __init__(self, pieces: list[Piece], measure: Callable[[str], float]) -> None:
        space = measure(" ")
        widths = [measure(piece.text) for piece in pieces]
        self._pieces = pieces
        self._ends = list(accumulate((w + space * p.is_spaced for w, p in zip(widths, pieces, strict=True)), initial=0))
        self._trailing = [space * piece.is_spaced for piece in pieces]

    def __len__(self) -> int:
        return len(self._pieces)

    def width(self, start: int, stop: int) -> float:
        """Return the width of pieces [start, stop), without the trailing space."""
        return self._ends[stop] - self._ends[start] - self._trailing[stop - 1]

    def cost(self, stop: int) -> float:
        """Return the cost of a break before `stop`."""
        return self._pieces[stop - 1].cost

    def text(self, start: int, stop: int) -> str:
        return "".join(text + " " * is_spaced for text, is_spaced, _ in self._pieces[start:stop]).rstrip(" ")

    def reach(self, start: int, width: float) -> int:
        """Return the end of the longest run from `start` that fits into `width`; at least one piece."""
        stop = bisect_right(self._ends, self._ends[start] + width, lo=start + 1)
        # A trailing space takes no width.
        return stop if stop <= len(self) and self.width(start, stop) <= width else max(start + 1, stop - 1)


def _balance(row: _Row, latest: list[int], width: float) -> list[int]:
    """Return the line starts of least cost for as many lines as the greedy `latest`, and the end."""
    earliest = [len(row)]
    for _ in latest[2:]:
        earliest.append(bisect_left(range(len(row)), earliest[-1], key=lambda start: row.reach(start, width)))

    # best[start]: (cost of the lines before, their starts).
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [0])}
    for low, high in zip(reversed(earliest), latest[1:], strict=True):
        further: dict[int, tuple[float, list[int]]] = {}
        for start, (cost, starts) in best.items():
            for stop in range(max(low, start + 1), min(high, row.reach(start, width)) + 1):
                total = cost + (1 - row.width(start, stop) / width) ** 2 + row.cost(stop)
                if stop not in further or total < further[stop][0]:
                    further[stop] = total, [*starts, stop]
        best = further
    return best[len(row)][1]


def _join_phrases(pieces: list[Piece]) -> list[Piece]:
    """Join pieces that a phrase spans."""
    found = pieces[:1]
    for piece in pieces[1:]:
        if found[-1].cost >= PHRASE_GOES_ON:
            found[-1] = piece._replace(text=found[-1].text + piece.text)
        else:
            found.append(piece)
    return found


def _split_wide(
    pieces: list[Piece], width: float, measure: Callable[[str], float], breaking: Breaking
) -> list[Piece] | None:
    """Split pieces wider than `width` into graphemes where `breaking` allows it; None where it does not."""
    found: list[Piece] = []
    for piece in pieces:
        if measure(piece.text) <= width or len(signs := _graphemes(piece.text)) == 1:
            found.append(piece)
        elif breaking is Breaking.ALL or (breaking is Breaking.SYLLABLES and _HAS_SYLLABLES.search(piece.text)):
            found += [Piece(sign, False) for sign in signs[:-1]] + [Piece(signs[-1], piece.is_spaced)]
        else:
            return None
    return found


def _split_at_breaks(word: str) -> list[str]:
    """Split `word` at every allowed break."""
    signs = _graphemes(word)
    parts = signs[:1]
    for before, after in pairwise(signs):
        if _may_break(before[0], after[0]):
            parts.append(after)
        else:
            parts[-1] += after
    return parts or [""]


def _may_break(before: str, after: str) -> bool:
    if before in NOT_LAST or after in NOT_FIRST or _IS_HANGUL.match(before) or _IS_HANGUL.match(after):
        return False
    if _IS_KATAKANA.match(before) and _IS_KATAKANA.match(after):
        return False
    return bool(_IS_IDEOGRAPHIC.match(before) or _IS_IDEOGRAPHIC.match(after) or _is_full_stop(before))


def _is_full_stop(sign: str) -> bool:
    """Return whether it is wide closing punctuation; small Kana do not begin a line either, but close nothing."""
    return (
        sign in NOT_FIRST and unicodedata.category(sign).startswith("P") and unicodedata.east_asian_width(sign) in "WFH"
    )


def _break_cost(before: str, after: str) -> float:
    """Return the cost of a break between two graphemes."""
    if _is_full_stop(before) or after in NOT_LAST:
        return 0.0
    if _IS_HIRAGANA.match(before) and not _IS_HIRAGANA.match(after):
        return PHRASE_ENDS
    is_edge = bool(_IS_KATAKANA.match(before)) is not bool(_IS_KATAKANA.match(after))
    return WORD_ENDS if is_edge else PHRASE_GOES_ON


def _graphemes(text: str) -> list[str]:
    """Split into characters with their combining marks, joined by viramas and joiners.

    An approximation of UAX #29's extended grapheme clusters by Python's character data.
    """
    signs: list[str] = []
    for character in text:
        is_extending = is_ignorable(character) or unicodedata.category(character) in MARKS
        before = signs[-1][-1] if signs else " "
        is_bound = before == ZWJ or unicodedata.combining(before) == VIRAMA_CLASS
        if signs and (is_extending or is_bound):
            signs[-1] += character
        else:
            signs.append(character)
    return signs
