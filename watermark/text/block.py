"""A typeset headline: its lines in one font, the size of their ink, and the coverage of their letters."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont


class Ink(NamedTuple):
    """Ink bounds of a line, in px from the start of its baseline."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Block:
    """A typeset headline: `lines` in `font`, then scaled by `scale`, which is below 1 only where nothing else fits.

    `padding` for a panel or a shadow on each side: (across, down) in px.
    """

    font: ImageFont.FreeTypeFont
    lines: tuple[str, ...]
    stroke_px: int
    padding: tuple[int, int]
    scale: float = 1.0

    @property
    def font_px(self) -> float:
        """The letters' size in the image."""
        return float(self.font.size) * self.scale

    @property
    def ink_size(self) -> tuple[int, int]:
        """Width and height of the ink, outline included, in the image."""
        left, top, right, bottom = self._ink
        return max(1, int((right - left) * self.scale)), max(1, int((bottom - top) * self.scale))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, padding included."""
        (width, height), (across, down) = self.ink_size, self.padding
        return width + 2 * across, height + 2 * down

    def letters(self, alignment: float, *, stroke_px: int = 0) -> Image.Image:
        """Draw the letters' coverage, grown by `stroke_px`: mode L, of `ink_size`; `alignment` 0 is left, 1 right."""
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
        inks = []
        for line in self.lines:
            # Not `getbbox`, which includes side bearings and the space down to the baseline.
            mask, (left, top) = self.font.getmask2(line, "L", anchor="ls", stroke_width=self.stroke_px)
            box = mask.getbbox() or (0, 0, 0, 0)
            inks.append(Ink(left + box[0], top + box[1], left + box[2], top + box[3]))
        return tuple(inks)

    @cached_property
    def _ink(self) -> Ink:
        return union_of_lines(self._inks, self._pitch)


def union_of_lines(inks: Sequence[Ink], pitch: float) -> Ink:
    """Return the bounds of lines `pitch` apart whose ink is aligned at the left."""
    return Ink(
        0.0,
        min(ink.top + number * pitch for number, ink in enumerate(inks)),
        max(ink.right - ink.left for ink in inks),
        max(ink.bottom + number * pitch for number, ink in enumerate(inks)),
    )
