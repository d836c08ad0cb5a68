"""Typeset a headline: choose the font size and the line breaks that fit."""

import math
from typing import NamedTuple

from PIL import ImageFont

from watermark.text.block import Block, Ink, union_of_lines
from watermark.text.overlay import TextOverlay
from watermark.text.shaping import keep_direction
from watermark.text.typefaces import Typeface
from watermark.text.wrapping import Breaking, wrap

# Widths are measured once at this size and scaled; the drawn text is measured again.
REFERENCE_PX = 128
# Hinting distorts smaller glyphs; a text that needs less is drawn at this size and scaled down.
MIN_FONT_PX = 8
MAX_FONT_PX = 1024
# Words are broken before letters become smaller than this: px, and a fraction of the square root of the image's area.
READABLE_PX, READABLE_FRACTION = 12, 0.03
# A headline of automatic size takes this fraction of the width and a third of the height inside the margins.
FIT_WIDTH, FIT_HEIGHT, FIT_LINES = 0.9, 1 / 3, 3
# One that would be unreadable takes more lines and this height, and finally all of it.
LONG_HEIGHT = 0.6
# Upper limit for a short word, as a fraction of the square root of the image's area.
LARGEST_FRACTION = 0.16
# Letters may shrink by this factor to avoid a break inside a phrase.
PHRASE_SHRINK = 0.7

# All in letter sizes.
BOX_PADDING = (0.5, 0.35)
SHADOW_OFFSET = 0.05
SHADOW_BLUR = 0.07
# A blur is a thousandth of its peak this many standard deviations away.
BLUR_REACH = 3


class _Constraints(NamedTuple):
    """The space for the headline, in px, with the line breaks and font sizes allowed."""

    width: float
    height: float
    max_lines: int
    breaking: Breaking
    min_px: int
    max_px: int


class Typesetter:
    """Typesets one headline; measures its words once for all sizes."""

    def __init__(self, overlay: TextOverlay, lines: tuple[str, ...], typeface: Typeface) -> None:
        self.overlay = overlay
        self._lines = lines
        self._typeface = typeface
        self._reference = ImageFont.truetype(typeface.path, REFERENCE_PX, index=typeface.index)
        self._pitch = sum(self._reference.getmetrics()) / REFERENCE_PX
        self._widths: dict[str, float] = {}
        self._inks: dict[str, Ink] = {}

    def typeset(self, image: tuple[int, int], room: tuple[int, int], share: float = 1.0) -> Block:
        """Typeset for an image of (width, height), all of it inside `room`.

        A requested size is kept where it fits, else the largest that does; `share` scales it down. Where not even the
        smallest letters fit, the block is scaled down.
        """
        for limits in self._candidates(image, room, share):
            block = self._fit(limits)
            if block is not None:
                # Broken only between phrases where that makes it not much smaller or longer.
                font_px = int(block.font.size)
                min_px = font_px if self.overlay.size else math.ceil(font_px * PHRASE_SHRINK)
                max_lines = min(limits.max_lines, len(block.lines) + 1)
                return self._fit(_Constraints(*limits[:2], max_lines, Breaking.PHRASES, min_px, font_px)) or block
        return self._scale_down(room)

    def _candidates(self, image: tuple[int, int], room: tuple[int, int], share: float) -> tuple[_Constraints, ...]:
        mean_side = math.sqrt(image[0] * image[1])
        size, any_lines = self.overlay.size, len("".join(self._lines)) + len(self._lines)
        wanted = LARGEST_FRACTION * mean_side if size is None else size * image[1]
        if share < 1:
            # A share of the fitted size: where width is the limit, a smaller height alone changes nothing.
            wanted = self.typeset(image, room).font_px * share
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

    def _fit(self, limits: _Constraints) -> Block | None:
        """Return the largest size that fits: binary search on reference widths, then px by px on the drawn letters."""
        low, high = limits.min_px, limits.max_px
        if self._wrap_at(limits, low, evenly=False) is None:
            return None
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (low, middle - 1) if self._wrap_at(limits, middle, evenly=False) is None else (middle, high)

        for font_px in range(low, limits.min_px - 1, -1):
            lines = self._wrap_at(limits, font_px)
            block = self._block(font_px, lines) if lines else None
            if block and block.size[0] <= limits.width and block.size[1] <= limits.height:
                return block
        return None

    def _wrap_at(self, limits: _Constraints, font_px: int, *, evenly: bool = True) -> list[str] | None:
        """Wrap at `font_px`; None where the lines do not fit by the reference widths."""
        across, down = (2 * (pad + self._stroke(font_px)) for pad in self._padding(font_px))
        width, height = (limits.width - across) / font_px, (limits.height - down) / font_px
        if width <= 0 or height <= 0:
            return None
        lines = self._wrap_lines(width, limits.breaking, evenly=evenly)
        if lines is None or len(lines) > limits.max_lines:
            return None
        ink = union_of_lines([self._ink(line) for line in lines], self._pitch)
        return lines if ink.right - ink.left <= width and ink.bottom - ink.top <= height else None

    def _wrap_lines(self, width: float, breaking: Breaking, *, evenly: bool = True) -> list[str] | None:
        """Wrap every line to at most `width` letter sizes."""
        found: list[str] = []
        for line in self._lines:
            broken = wrap(line, width, self._width, breaking, evenly=evenly) if line else [""]
            if broken is None:
                return None
            found += [keep_direction(line, part) for part in broken]
        return found

    def _scale_down(self, room: tuple[int, int]) -> Block:
        """Scale down the smallest letters until they fit."""
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
        font = ImageFont.truetype(self._typeface.path, font_px, index=self._typeface.index)
        return Block(font, tuple(lines), self._stroke(font_px), padding, scale)

    def _stroke(self, font_px: int) -> int:
        stroke = self.overlay.stroke
        return max(1, round(stroke.width * font_px)) if stroke and stroke.width else 0

    def _padding(self, font_px: int) -> tuple[int, int]:
        shadow = SHADOW_OFFSET + BLUR_REACH * SHADOW_BLUR if self.overlay.shadow else 0.0
        across, down = (max(pad if self.overlay.box else 0.0, shadow) for pad in BOX_PADDING)
        return math.ceil(across * font_px), math.ceil(down * font_px)

    def _width(self, text: str) -> float:
        if text not in self._widths:
            self._widths[text] = self._reference.getlength(text) / REFERENCE_PX
        return self._widths[text]

    def _ink(self, line: str) -> Ink:
        if line not in self._inks:
            box = self._reference.getbbox(line, anchor="ls")
            self._inks[line] = Ink(*(side / REFERENCE_PX for side in box))
        return self._inks[line]
