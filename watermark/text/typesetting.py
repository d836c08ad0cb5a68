"""Sets a headline: how large its letters are, where its lines break, and how much room all of it takes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from watermark.text.overlay import TextOverlay
from watermark.text.shaping import keep_direction
from watermark.text.typefaces import Typeface
from watermark.text.wrapping import Breaking, wrap

# Widths are measured once at this size and scaled; what is drawn is measured again.
REFERENCE_PX = 128
# Hinting makes nonsense of less; a text that needs less is drawn at this size and scaled down.
MIN_FONT_PX = 8
MAX_FONT_PX = 1024
# Words are rather broken than made smaller than this: px, and of the square root of the picture's area.
READABLE_PX, READABLE_FRACTION = 12, 0.03
# Of the picture without its margins, a headline whose size is to fit takes this width and a third of the height.
FIT_WIDTH, FIT_HEIGHT, FIT_LINES = 0.9, 1 / 3, 3
# One that would be unreadable so takes more lines and this height, and at last all there is.
LONG_HEIGHT = 0.6
# And a short word is not blown up beyond this, of the square root of the picture's area.
LARGEST_FRACTION = 0.16
# A phrase that is torn apart by a break is made whole by letters that are this much smaller.
WORTH_A_PHRASE = 0.7

# All in letter sizes.
BOX_PADDING = (0.5, 0.35)
SHADOW_OFFSET = 0.05
SHADOW_BLUR = 0.07
# A blur is a thousandth of its peak this many standard deviations away.
BLUR_REACH = 3


class Ink(NamedTuple):
    """Where the ink of a line lies, in px from where its baseline begins."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Block:
    """A headline that is set: `lines` in a font of `font_px`, then scaled by `scale`, which is 1 but for a crowd.

    `padding` is what a panel or a shadow takes on each side: (across, down) in px.
    """

    font: ImageFont.FreeTypeFont
    lines: tuple[str, ...]
    stroke_px: int
    padding: tuple[int, int]
    scale: float = 1.0

    @property
    def font_px(self) -> float:
        """The letters' size in the picture."""
        return float(self.font.size) * self.scale

    @property
    def ink_size(self) -> tuple[int, int]:
        """Width and height of the ink, outline included, in the picture."""
        left, top, right, bottom = self._ink
        return max(1, int((right - left) * self.scale)), max(1, int((bottom - top) * self.scale))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of all of it."""
        (width, height), (across, down) = self.ink_size, self.padding
        return width + 2 * across, height + 2 * down

    def letters(self, alignment: float, *, stroke_px: int = 0) -> Image.Image:
        """The coverage of the letters, grown by `stroke_px`: mode L, `ink_size` large; 0 aligns left and 1 right."""
        left, top, right, bottom = self._ink
        canvas = Image.new("L", (max(1, int(right - left)), max(1, int(bottom - top))))
        draw = ImageDraw.Draw(canvas)
        for number, (line, ink) in enumerate(zip(self.lines, self._inks, strict=True)):
            start = round((right - left - (ink.right - ink.left)) * alignment) - ink.left
            draw.text(
                (start, number * self._pitch - top), line, fill=255, font=self.font, anchor="ls", stroke_width=stroke_px
            )
        return canvas if self.scale == 1 else canvas.resize(self.ink_size, Image.Resampling.BOX)

    @property
    def _pitch(self) -> int:
        return sum(self.font.getmetrics())

    @cached_property
    def _inks(self) -> tuple[Ink, ...]:
        return tuple(self._measure_ink(line) for line in self.lines)

    def _measure_ink(self, line: str) -> Ink:
        # Not `getbbox`, which counts the blank to a letter's sides and down to the baseline as ink.
        mask, (left, top) = self.font.getmask2(line, "L", anchor="ls", stroke_width=self.stroke_px)
        box = mask.getbbox() or (0, 0, 0, 0)
        return Ink(left + box[0], top + box[1], left + box[2], top + box[3])

    @cached_property
    def _ink(self) -> Ink:
        return union_of_lines(self._inks, self._pitch)


class _Constraints(NamedTuple):
    """A room for the headline, in px, and what it may do to fit in there."""

    width: float
    height: float
    max_lines: int
    breaking: Breaking
    min_px: int
    max_px: int


class Typesetter:
    """Sets one headline; measures its words once however many sizes are tried."""

    def __init__(self, overlay: TextOverlay, lines: tuple[str, ...], typeface: Typeface) -> None:
        self._overlay = overlay
        self._lines = lines
        self._typeface = typeface
        self._reference = self._font(REFERENCE_PX)
        self._pitch = sum(self._reference.getmetrics()) / REFERENCE_PX
        self._widths: dict[str, float] = {}
        self._inks: dict[str, Ink] = {}

    @property
    def is_size_automatic(self) -> bool:
        """Whether nobody said how large the letters are to be."""
        return self._overlay.size is None

    def typeset(self, picture: tuple[int, int], room: tuple[int, int], share: float = 1.0) -> Block:
        """The headline at its best size for a picture of (width, height), all of it inside `room`.

        A size that was given is kept where it fits, and else the largest that does; `share` of it where it is to be
        smaller. Where nothing fits even in the smallest letters, they are scaled down.
        """
        for attempt in self._candidates(picture, room, share):
            block = self._fit(attempt)
            if block is not None:
                return self._break_at_phrases(attempt, block)
        return self._scale_down(room)

    def _break_at_phrases(self, attempt: _Constraints, block: Block) -> Block:
        """A block that breaks between phrases alone, where it need not be much smaller or longer for it."""
        font_px = int(block.font.size)
        min_px = font_px if self._overlay.size else math.ceil(font_px * WORTH_A_PHRASE)
        max_lines = min(attempt.max_lines, len(block.lines) + 1)
        return self._fit(_Constraints(*attempt[:2], max_lines, Breaking.PHRASES, min_px, font_px)) or block

    def _candidates(self, picture: tuple[int, int], room: tuple[int, int], share: float) -> tuple[_Constraints, ...]:
        mean_side = math.sqrt(picture[0] * picture[1])
        size, any_lines = self._overlay.size, len("".join(self._lines)) + len(self._lines)
        wanted = LARGEST_FRACTION * mean_side if size is None else size * picture[1]
        if share < 1:
            # Of what it would be: where the width is short, less height alone makes nothing smaller.
            wanted = self.typeset(picture, room).font_px * share
        largest = min(MAX_FONT_PX, max(MIN_FONT_PX, round(wanted)))
        readable = min(largest, max(READABLE_PX, round(READABLE_FRACTION * mean_side)))
        if size is not None:
            return (
                _Constraints(*room, any_lines, Breaking.SYLLABLES, readable, largest),
                _Constraints(*room, any_lines, Breaking.ALL, MIN_FONT_PX, largest),
            )
        width, lines = room[0] * FIT_WIDTH, max(FIT_LINES, len(self._lines))
        return (
            _Constraints(width, room[1] * FIT_HEIGHT * share, lines, Breaking.WORDS, readable, largest),
            _Constraints(width, room[1] * FIT_HEIGHT * share, lines, Breaking.ALL, readable, largest),
            _Constraints(width, room[1] * LONG_HEIGHT * share, any_lines, Breaking.ALL, readable, largest),
            _Constraints(*room, any_lines, Breaking.ALL, MIN_FONT_PX, largest),
        )

    def _fit(self, attempt: _Constraints) -> Block | None:
        """The largest size that fits, found by halving, and by ones where the drawn letters are wider than thought."""
        low, high = attempt.min_px, attempt.max_px
        if self._wrap_at(attempt, low, evenly=False) is None:
            return None
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (low, middle - 1) if self._wrap_at(attempt, middle, evenly=False) is None else (middle, high)

        for font_px in range(low, attempt.min_px - 1, -1):
            lines = self._wrap_at(attempt, font_px)
            block = self._block(font_px, lines) if lines else None
            if block and block.size[0] <= attempt.width and block.size[1] <= attempt.height:
                return block
        return None

    def _wrap_at(self, attempt: _Constraints, font_px: int, *, evenly: bool = True) -> list[str] | None:
        """The lines at `font_px`; None where they do not fit, as far as can be told from the reference."""
        across, down = (2 * (pad + self._stroke(font_px)) for pad in self._padding(font_px))
        width, height = (attempt.width - across) / font_px, (attempt.height - down) / font_px
        if width <= 0 or height <= 0:
            return None
        lines = self._wrap_lines(width, attempt.breaking, evenly=evenly)
        if lines is None or len(lines) > attempt.max_lines:
            return None
        ink = union_of_lines([self._ink(line) for line in lines], self._pitch)
        return lines if ink.right - ink.left <= width and ink.bottom - ink.top <= height else None

    def _wrap_lines(self, width: float, breaking: Breaking, *, evenly: bool = True) -> list[str] | None:
        """Every line broken into those that are at most `width` letter sizes wide."""
        found: list[str] = []
        for line in self._lines:
            broken = wrap(line, width, self._width, breaking, evenly=evenly) if line else [""]
            if broken is None:
                return None
            found += [keep_direction(line, part) for part in broken]
        return found

    def _scale_down(self, room: tuple[int, int]) -> Block:
        """The smallest letters, scaled down until they fit."""
        scale = 1.0
        while True:
            scale *= 0.9
            lines = self._wrap_lines(max(1.0, room[0] / scale / MIN_FONT_PX - 1), Breaking.ALL)
            block = self._block(MIN_FONT_PX, lines or [], scale)
            if block.size[0] <= room[0] and block.size[1] <= room[1]:
                return block

    def _block(self, font_px: int, lines: list[str], scale: float = 1.0) -> Block:
        across, down = self._padding(font_px)
        padding = int(across * scale), int(down * scale)
        return Block(self._font(font_px), tuple(lines), self._stroke(font_px), padding, scale)

    def _stroke(self, font_px: int) -> int:
        stroke = self._overlay.stroke
        return max(1, round(stroke.width * font_px)) if stroke and stroke.width else 0

    def _padding(self, font_px: int) -> tuple[int, int]:
        shadow = SHADOW_OFFSET + BLUR_REACH * SHADOW_BLUR if self._overlay.shadow else 0.0
        across, down = (max(pad if self._overlay.box else 0.0, shadow) for pad in BOX_PADDING)
        return math.ceil(across * font_px), math.ceil(down * font_px)

    def _font(self, font_px: int) -> ImageFont.FreeTypeFont:
        return ImageFont.truetype(self._typeface.path, font_px, index=self._typeface.index)

    def _width(self, text: str) -> float:
        if text not in self._widths:
            self._widths[text] = self._reference.getlength(text) / REFERENCE_PX
        return self._widths[text]

    def _ink(self, line: str) -> Ink:
        if line not in self._inks:
            box = self._reference.getbbox(line, anchor="ls")
            self._inks[line] = Ink(*(side / REFERENCE_PX for side in box))
        return self._inks[line]


def union_of_lines(inks: Sequence[Ink], pitch: float) -> Ink:
    """The ink of lines that begin one above the other, `pitch` apart; each is as wide as its own ink."""
    return Ink(
        0.0,
        min(ink.top + number * pitch for number, ink in enumerate(inks)),
        max(ink.right - ink.left for ink in inks),
        max(ink.bottom + number * pitch for number, ink in enumerate(inks)),
    )
