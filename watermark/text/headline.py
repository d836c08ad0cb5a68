"""Draw headlines on an image: RGB in, RGB out. The same input gives the same bytes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from watermark.errors import FontMissing, OverlayInvalid
from watermark.geometry import Rect
from watermark.quiet_region import gradient_energy, quietest_region
from watermark.text.block import Block
from watermark.text.contrast import Colours, choose_colours, opposite
from watermark.text.mark import clean_lines, is_visible
from watermark.text.overlay import TextOverlay
from watermark.text.typefaces import Typeface, choose_typeface
from watermark.text.typesetting import BOX_PADDING, SHADOW_BLUR, SHADOW_OFFSET, Typesetter

# Margin of a headline, as a fraction of the image's shorter side.
MARGIN = 0.04
# Preferred position among equally quiet ones: centred in the upper part.
DEFAULT_TARGET = (0.5, 0.15)
# Size factors tried in order while an automatically placed headline would overlap another part.
SCALES = (1.0, 0.75, 0.5, 0.35)
# Where the quietest region exceeds this energy, a headline of automatic size shrinks once if that gets below the ratio.
BUSY_GREY_LEVELS = 0.5
MAX_ENERGY_RATIO = 0.25
SHADOW_OPACITY = 0.6
# In letter sizes: corner radius of panels, fade width of the contrast panel, and the margin around an automatically
# placed headline in the search for its region.
CORNER = 0.2
FADE = 0.6
QUIET_MARGIN = 0.4
# Fraction of the image's width: with less free width a headline's lines are centred.
MIN_FREE_WIDTH = 0.2


@dataclass(frozen=True, slots=True)
class Headline:
    """A drawable headline: its lines, and a typeface that has their characters."""

    overlay: TextOverlay
    lines: tuple[str, ...]
    typeface: Typeface


def prepare_headline(overlay: TextOverlay, font_dirs: tuple[Path, ...]) -> Headline:
    """Check the text of `overlay` and choose its typeface.

    Raises `OverlayInvalid` where its text has control characters or no ink, `FontMissing` where no font in `font_dirs`,
    or not the requested family, has every character, or where there is no such family.
    """
    lines = clean_lines(overlay.text)
    text = "".join(lines)
    typeface = choose_typeface(text, overlay.font, font_dirs)
    if not is_visible(text, typeface.path, typeface.index):
        raise OverlayInvalid("the text has no visible character")
    return Headline(overlay, lines, typeface)


def prepare_headlines(overlays: tuple[TextOverlay, ...], font_dirs: tuple[Path, ...]) -> tuple[Headline, ...]:
    """Prepare each overlay; an error's message begins with the field, `text_overlay[1]` for the second of several."""
    found = []
    for number, overlay in enumerate(overlays):
        field = "text_overlay" if len(overlays) == 1 else f"text_overlay[{number}]"
        try:
            found.append(prepare_headline(overlay, font_dirs))
        except (OverlayInvalid, FontMissing) as error:
            raise type(error)(f"{field}: {error}") from error
    return tuple(found)


def draw_headlines(image: Image.Image, headlines: Iterable[Headline], *, avoid: tuple[Rect, ...] = ()) -> Image.Image:
    """Return an RGB copy of `image` with the headlines painted in order, each inside the margins.

    Automatically placed headlines avoid the others and `avoid`, where there is room.
    """
    pixels = image.convert("RGB")
    pixels.info = {}
    for headline, block, place in _lay_out(pixels, tuple(headlines), avoid):
        _paint(pixels, headline.overlay, block, place)
    return pixels


def _lay_out(
    image: Image.Image, headlines: tuple[Headline, ...], avoid: tuple[Rect, ...]
) -> list[tuple[Headline, Block, Rect]]:
    """Place all headlines, those with a fixed position first, so that the others avoid them."""
    margin = min(math.ceil(min(image.size) * MARGIN), (min(image.size) - 1) // 2)
    room = Rect(margin, margin, image.width - margin, image.height - margin)
    found: dict[int, tuple[Headline, Block, Rect]] = {}
    for number, headline in sorted(enumerate(headlines), key=lambda item: item[1].overlay.position is None):
        setter = Typesetter(headline.overlay, headline.lines, headline.typeface)
        if headline.overlay.position is not None:
            block = setter.typeset(image.size, room.size)
            across, down = headline.overlay.position.fractions
            left = room.left + round((room.size[0] - block.size[0]) * across)
            top = room.top + round((room.size[1] - block.size[1]) * down)
            place = Rect(left, top, left + block.size[0], top + block.size[1])
        else:
            block, place = _find_quiet_place(image, setter, room, avoid)
        avoid = (*avoid, place)
        found[number] = headline, block, place
    return [found[number] for number in range(len(headlines))]


def _find_quiet_place(
    image: Image.Image, setter: Typesetter, room: Rect, avoid: tuple[Rect, ...]
) -> tuple[Block, Rect]:
    """Find the quietest region; shrink the block where a larger one would overlap or be on a busy region."""
    for share in SCALES:
        block, place = _place_at_scale(image, setter, room, avoid, share)
        if not any(place.overlaps(other) for other in avoid):
            break
    energy = gradient_energy(image, place)
    if setter.overlay.size is None and share == SCALES[0] and energy > BUSY_GREY_LEVELS:
        smaller, elsewhere = _place_at_scale(image, setter, room, avoid, SCALES[1])
        if gradient_energy(image, elsewhere) < MAX_ENERGY_RATIO * energy:
            return smaller, elsewhere
    return block, place


def _place_at_scale(
    image: Image.Image, setter: Typesetter, room: Rect, avoid: tuple[Rect, ...], share: float
) -> tuple[Block, Rect]:
    block = setter.typeset(image.size, room.size, share)
    width, height = block.size
    around = round(QUIET_MARGIN * block.font_px)
    left, top = quietest_region(
        image,
        (width + 2 * around, height + 2 * around),
        within=Rect(room.left - around, room.top - around, room.right + around, room.bottom + around),
        avoid=avoid,
        towards=DEFAULT_TARGET,
    )
    left, top = left + around, top + around
    return block, Rect(left, top, left + width, top + height)


def _paint(image: Image.Image, overlay: TextOverlay, block: Block, place: Rect) -> None:
    across, down = block.padding
    ink = Rect(place.left + across, place.top + down, place.right - across, place.bottom - down)
    colours = choose_colours(np.asarray(image.crop(ink)), overlay)
    alignment = _alignment(overlay, place, image.width)
    edge = block.letters(alignment, stroke_px=block.stroke_px)

    if colours.opacity:
        _paint_panel(image, overlay, block, ink, colours)
    if overlay.shadow:
        _paint_shadow(image, edge, block, ink, opposite(colours.text))
    if block.stroke_px:
        image.paste(colours.stroke, ink, edge)
    image.paste(colours.text, ink, block.letters(alignment))


def _alignment(overlay: TextOverlay, place: Rect, width: int) -> float:
    """Return the lines' alignment, 0 left to 1 right: as the headline is placed on the image."""
    if overlay.position is not None:
        return overlay.position.fractions[0]
    free = width - place.size[0]
    if free < MIN_FREE_WIDTH * width:
        return 0.5
    return (0.0, 0.5, 1.0)[min(2, int(place.left / free * 3))]


def _paint_panel(image: Image.Image, overlay: TextOverlay, block: Block, ink: Rect, colours: Colours) -> None:
    """Paint the requested panel with rounded corners, or the contrast panel, which fades out to all sides."""
    font_px = block.font_px
    if overlay.box is not None:
        reach = tuple(int(padding * font_px) for padding in BOX_PADDING)
        inner, fade = CORNER * font_px, 1.0
    else:
        reach = (math.ceil(FADE * font_px), math.ceil(FADE * font_px))
        inner, fade = 0.0, max(1.0, FADE * font_px)
    width, height = ink.size[0] + 2 * reach[0], ink.size[1] + 2 * reach[1]
    density = _rounded_box((width, height), inner + (0 if overlay.box else fade), fade)
    mask = Image.fromarray(np.rint(density * colours.opacity).astype(np.uint8))
    image.paste(colours.panel, (ink.left - reach[0], ink.top - reach[1]), mask)


def _rounded_box(size: tuple[int, int], radius: float, fade: float) -> NDArray[np.float32]:
    """Return (height, width) from 0 to 1: a rounded rectangle that fades over its outermost `fade` px.

    By the distance to a rounded box: Quilez, "2D distance functions".
    """
    width, height = size
    radius = min(radius, width / 2, height / 2)
    beyond_x = (np.abs(np.arange(width) + 0.5 - width / 2) - (width / 2 - radius)).astype(np.float32)[None, :]
    beyond_y = (np.abs(np.arange(height) + 0.5 - height / 2) - (height / 2 - radius)).astype(np.float32)[:, None]
    outside = np.hypot(beyond_x.clip(min=0), beyond_y.clip(min=0))
    distance = outside + np.maximum(beyond_x, beyond_y).clip(max=0) - np.float32(radius)
    depth: NDArray[np.float32] = ((np.float32(0.5) - distance) / np.float32(fade)).clip(0, 1)
    return depth * depth * (3 - 2 * depth)


def _paint_shadow(image: Image.Image, edge: Image.Image, block: Block, ink: Rect, colour: tuple[int, int, int]) -> None:
    """Paint a blurred shadow of the letters, offset to the lower right."""
    across, down = block.padding
    offset = round(SHADOW_OFFSET * block.font_px)
    canvas = Image.new("L", block.size)
    canvas.paste(edge, (across + offset, down + offset))
    soft = canvas.filter(ImageFilter.GaussianBlur(SHADOW_BLUR * block.font_px))
    image.paste(colour, (ink.left - across, ink.top - down), soft.point(lambda value: value * SHADOW_OPACITY))
