"""`python -m examples.overlays OUT`: sheets of headlines: every place, script and dress on four grounds."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from config.section import load_section
from config.service import ServiceSettings
from examples.demo.contact_sheet import BACKGROUND, FAINT, GAP, INK
from watermark.geometry import Position
from watermark.text.headline import draw_headlines, prepare_headline
from watermark.text.overlay import Box, Stroke, TextOverlay

SIDE = 512
NUM_LIGHTS = 90
TEXTS = {
    "English": "Autumn blends, roasted today",
    "Korean": "가을 한정 원두 커피를 지금 만나 보세요",
    "Japanese": "秋の新作コレクション、本日より発売！",
    "Chinese": "全新咖啡馆今日盛大开业，欢迎光临",
}
DRESSES = {
    "plain": TextOverlay(""),
    "stroke": TextOverlay("", stroke=Stroke(0.05, None)),
    "shadow": TextOverlay("", shadow=True),
    "box": TextOverlay("", box=Box(None, 0.6)),
    "colours": TextOverlay("", colour="#ffd23f", stroke=Stroke(0.06, "#5a1e5c"), shadow=True),
    "small, in a coloured box": TextOverlay(
        "", size=0.06, colour="#ffffff", box=Box("#c02942", 0.9), position=Position.BOTTOM_LEFT
    ),
}
EXTREMES = (
    ("one long word", (512, 512), TextOverlay("Donaudampfschifffahrtsgesellschaftskapitänsmütze")),
    ("and larger than can be", (512, 512), TextOverlay("대한민국만세" * 8, size=0.3)),
    ("300 characters", (512, 512), TextOverlay("The quick brown fox jumps over the lazy dog. " * 7)),
    ("64 px", (64, 64), TextOverlay("Half price")),
    ("wide", (1024, 256), TextOverlay("Half price on everything, this week only")),
    ("tall", (256, 1024), TextOverlay("반값 세일 이번 주에만")),
    ("150 lines", (256, 256), TextOverlay("x\n" * 150)),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", default=Path("out/overlays"), help="folder of the sheets")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, sheet in (
        ("positions", positions()),
        ("grounds", grounds()),
        ("dresses", dresses()),
        ("extremes", extremes()),
    ):
        sheet.save(out / f"{name}.png", optimize=True)
    overview().save(out / "overlays.png", optimize=True)
    return 0


def positions() -> Image.Image:
    """Draw each script in each of its places, and in the place found automatically."""
    places: list[Position | None] = [*Position, None]
    return _sheet(
        [str(place or "auto") for place in places],
        {
            script: [_drawn(TextOverlay(text, position=place, size=0.1), landscape(SIDE)) for place in places]
            for script, text in TEXTS.items()
        },
    )


def grounds() -> Image.Image:
    """Draw each script at its own size and place on each ground."""
    return _sheet(
        list(GROUNDS),
        {
            script: [_drawn(TextOverlay(text), make(SIDE)) for make in GROUNDS.values()]
            for script, text in TEXTS.items()
        },
    )


def dresses() -> Image.Image:
    """Draw each way to set letters off, on each ground."""
    text = TEXTS["Korean"]
    return _sheet(
        list(DRESSES),
        {
            ground: [_drawn(replace(dress, text=text), make(SIDE)) for dress in DRESSES.values()]
            for ground, make in GROUNDS.items()
        },
    )


def extremes() -> Image.Image:
    """Draw texts that are too long, and images that are too small."""
    images = [_drawn(overlay, landscape(max(size)).resize(size)) for _, size, overlay in EXTREMES]
    return _sheet([name for name, _, _ in EXTREMES], {"": images})


def overview() -> Image.Image:
    """Draw the sheet of the documentation."""
    korean, grounds = TEXTS["Korean"], list(GROUNDS.values())
    rows = {
        "auto": [_drawn(TextOverlay(text), make(SIDE)) for text, make in zip(TEXTS.values(), grounds, strict=True)],
        "dressed": [
            _drawn(replace(dress, text=korean), make(SIDE))
            for dress, make in zip(list(DRESSES.values())[1:5], grounds, strict=True)
        ],
    }
    return _sheet(["", "", "", ""], rows, side=200)


def landscape(side: int) -> Image.Image:
    """Draw a calm evening sky over restless grass."""
    height = np.linspace(0, 1, side)[:, None, None]
    sky = np.array([40, 60, 120]) * (1 - height) + np.array([250, 170, 110]) * height
    image = np.broadcast_to(sky, (side, side, 3)).copy()
    grass = np.random.default_rng(1).integers(0, 110, (side, side, 1)) * np.array([0.5, 1, 0.3])
    hills = 0.62 + 0.06 * np.sin(np.linspace(0, 7, side))
    below = np.arange(side)[:, None] > (hills * side)[None, :]
    image[below] = grass[below]
    return Image.fromarray(image.astype(np.uint8))


def studio(side: int) -> Image.Image:
    """Draw a bright table with something striped on its right."""
    image = Image.new("RGB", (side, side), (236, 232, 226))
    pen = ImageDraw.Draw(image)
    for stripe in range(12):
        top = int(side * (0.25 + stripe * 0.05))
        pen.rectangle(
            (int(side * 0.62), top, int(side * 0.92), top + side // 40), (180 - 12 * stripe, 60, 70 + 9 * stripe)
        )
    return image


def lights(side: int) -> Image.Image:
    """Draw a night of lights out of focus: nowhere calm, nowhere of one brightness."""
    generator = np.random.default_rng(4)
    image = Image.new("RGB", (side, side), (12, 14, 30))
    for _ in range(NUM_LIGHTS):
        x, y = (int(place) for place in generator.integers(0, side, 2))
        radius = int(generator.integers(side // 40, side // 12))
        glow = Image.new("L", (side, side))
        ImageDraw.Draw(glow).ellipse((x - radius, y - radius, x + radius, y + radius), int(generator.integers(60, 220)))
        image.paste(tuple(int(value) for value in generator.integers(120, 256, 3)), (0, 0), glow)
    return image.filter(ImageFilter.GaussianBlur(side / 300))


def noise(side: int) -> Image.Image:
    """Draw uniform noise, the worst ground there is."""
    small = np.random.default_rng(2).integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.NEAREST)


GROUNDS: dict[str, Callable[[int], Image.Image]] = {
    "landscape": landscape,
    "studio": studio,
    "lights": lights,
    "noise": noise,
}


def _drawn(overlay: TextOverlay, image: Image.Image) -> Image.Image:
    font_dirs = load_section(ServiceSettings).font_dirs
    return draw_headlines(image, [prepare_headline(overlay, font_dirs)])


def _sheet(heads: Sequence[str], rows: dict[str, list[Image.Image]], *, side: int = 256) -> Image.Image:
    """Arrange rows of images, none larger than `side`, each column and row with its name."""
    head = 24 if any(heads) else 0
    cell = side + GAP
    sheet = Image.new("RGB", (GAP + len(heads) * cell, head + GAP + len(rows) * (cell + head)), BACKGROUND)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for row, (name, images) in enumerate(rows.items()):
        top = GAP + head + row * (cell + head)
        for column, image in enumerate(images):
            left = GAP + column * cell
            pen.text((left, top - head), heads[column], INK if row == 0 else FAINT, font=font)
            pen.text((left + side, top - head), name if column == 0 and head else "", FAINT, font=font, anchor="ra")
            shown = image.copy()
            shown.thumbnail((side, side), Image.Resampling.LANCZOS)
            sheet.paste(shown, (left, top))
    return sheet


if __name__ == "__main__":
    sys.exit(main())
