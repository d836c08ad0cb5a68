"""Choose readable colours: relative luminance and contrast ratio as in WCAG 2.2."""

from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from watermark.text.overlay import TextOverlay

Colour: TypeAlias = tuple[int, int, int]

WHITE: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)
# WCAG's level AA for text of any size.
MIN_CONTRAST = 4.5
# Target with a margin: Pillow's blending rounds by up to one grey level, 0.07 of contrast at middle grey.
AIMED_CONTRAST = 4.6
# Minimum outline width, in letter sizes, that separates letters from the background.
MIN_STROKE = 0.03
# Number of worst pixels in the binary search for a panel's opacity.
NUM_WORST = 4096

_SCALE = np.arange(256) / 255
_LINEAR = np.where(_SCALE <= 0.04045, _SCALE / 12.92, ((_SCALE + 0.055) / 1.055) ** 2.4)
# (3, 256): contribution of each channel's value to the luminance.
_LUMINANCE = (np.array([[0.2126], [0.7152], [0.0722]]) * _LINEAR).astype(np.float32)


class Colours(NamedTuple):
    """A headline's colours. The panel's `opacity` is from 0, no panel, to 255."""

    text: Colour
    stroke: Colour
    panel: Colour
    opacity: int


def choose_colours(under: NDArray[np.uint8], overlay: TextOverlay) -> Colours:
    """Choose the colours of `overlay` on `under`, the pixels (height, width, 3) that its letters will cover.

    A text without a colour is black or white, preferably one with 4.5:1 against every pixel, else the one of higher
    mean contrast on a panel of the opposite colour and the least sufficient opacity. A contrasting outline replaces the
    panel. A requested colour is used as it is.
    """
    least = round(overlay.box.opacity * 255) if overlay.box else 0
    if overlay.colour is not None:
        return _colours(parse_colour(overlay.colour), overlay, least)

    found = []
    for text in (WHITE, BLACK):
        colours = _colours(text, overlay, least)
        opacity = (
            least if _has_contrasting_outline(text, overlay) else _required_opacity(under, text, colours.panel, least)
        )
        if opacity is not None:
            shown = contrast_ratios(under, text, colours.panel, least)
            found.append((opacity > least, -float(np.log(shown).mean()), colours._replace(opacity=opacity)))
    return min(found)[2]


def contrast_ratios(
    under: NDArray[np.uint8], text: Colour, panel: Colour = BLACK, opacity: int = 0
) -> NDArray[np.float32]:
    """Return (height, width): contrast ratio, 1 to 21, of `text` to each pixel under the panel."""
    values = np.arange(256)
    seen = [(values * (255 - opacity) + channel * opacity + 127) // 255 for channel in panel]
    luminance = np.zeros(under.shape[:-1], np.float32)
    for channel in range(3):
        luminance += _LUMINANCE[channel][seen[channel]][under[..., channel]]
    own = np.float32(sum(_LUMINANCE[channel][text[channel]] for channel in range(3)))
    ratio = (luminance + np.float32(0.05)) / (own + np.float32(0.05))
    either_way: NDArray[np.float32] = np.maximum(ratio, 1 / ratio)
    return either_way


def parse_colour(text: str) -> Colour:
    """Parse `#rrggbb`."""
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


def opposite(colour: Colour) -> Colour:
    """Return black or white, whichever has the higher contrast."""
    return max((BLACK, WHITE), key=lambda other: _contrast(colour, other))


def _colours(text: Colour, overlay: TextOverlay, opacity: int) -> Colours:
    """Return the colours for letters of `text`: those that `overlay` requests, else the opposite of the letters'."""
    stroke, box = overlay.stroke, overlay.box
    return Colours(
        text,
        stroke=parse_colour(stroke.colour) if stroke and stroke.colour else opposite(text),
        panel=parse_colour(box.colour) if box and box.colour else opposite(text),
        opacity=opacity,
    )


def _has_contrasting_outline(text: Colour, overlay: TextOverlay) -> bool:
    """Return whether a wide enough, contrasting outline separates the letters from the background."""
    stroke = overlay.stroke
    if stroke is None or stroke.width < MIN_STROKE:
        return False
    return stroke.colour is None or _contrast(text, parse_colour(stroke.colour)) >= MIN_CONTRAST


def _required_opacity(under: NDArray[np.uint8], text: Colour, panel: Colour, least: int) -> int | None:
    """Return the lowest opacity from `least` that makes every pixel contrast; None where the panel itself does not."""
    plain = contrast_ratios(under, text, panel, least)
    if plain.min() >= AIMED_CONTRAST:
        return least
    if _contrast(text, panel) < MIN_CONTRAST:
        return None
    # Binary search on the worst pixels, then a few levels up until all pixels pass.
    worst = under.reshape(1, -1, 3)[:, np.argsort(plain, axis=None)[:NUM_WORST]]
    low, high = least, 255
    while high - low > 1:
        middle = (low + high) // 2
        is_readable = contrast_ratios(worst, text, panel, middle).min() >= AIMED_CONTRAST
        low, high = (low, middle) if is_readable else (middle, high)
    while high < 255 and contrast_ratios(under, text, panel, high).min() < AIMED_CONTRAST:
        high += 1
    return high


def _contrast(one: Colour, other: Colour) -> float:
    return float(contrast_ratios(np.array([[one]], np.uint8), other)[0, 0])
