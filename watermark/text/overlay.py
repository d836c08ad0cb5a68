"""The request for a headline: text, font, size, colours and position."""

from dataclasses import dataclass

from watermark.geometry import Position


@dataclass(frozen=True, slots=True)
class Stroke:
    """The outline of the letters: `width` as a fraction of their size; `colour` None is chosen by contrast."""

    width: float
    colour: str | None


@dataclass(frozen=True, slots=True)
class Box:
    """The panel behind the letters; `colour` None is chosen by contrast."""

    colour: str | None
    opacity: float


@dataclass(frozen=True, slots=True)
class TextOverlay:
    """One headline. None means automatic: `size` (a fraction of the image's height), `colour` (`#rrggbb`) black or
    white by contrast, `position` the quietest region, `font` any that has the glyphs."""

    text: str
    font: str | None = None
    size: float | None = None
    colour: str | None = None
    stroke: Stroke | None = None
    shadow: bool = False
    box: Box | None = None
    position: Position | None = None
