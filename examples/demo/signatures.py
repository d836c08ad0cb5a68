"""Three signatures for the demo, drawn rather than stored: a handwritten monogram, a red seal and a swirl."""

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIDE = 480
SUPERSAMPLING = 3
POINTS_PER_SEGMENT = 60
HALO_PX = 9  # a light rim, so that ink is seen on dark pictures

INK = (22, 24, 48)
VERMILION = (196, 38, 28)
LIGHT = (255, 255, 255)

Point: TypeAlias = tuple[float, float]

# All in a unit square, y down; a pen passes through the points of a stroke in order.
MONOGRAM = (
    ((0.04, 0.62), (0.13, 0.60), (0.24, 0.16), (0.26, 0.10), (0.22, 0.66), (0.25, 0.64), (0.43, 0.16), (0.46, 0.11),
     (0.45, 0.55), (0.53, 0.68), (0.70, 0.56), (0.84, 0.34), (0.78, 0.24), (0.69, 0.40), (0.76, 0.64), (0.96, 0.54)),
    ((0.10, 0.86), (0.36, 0.79), (0.66, 0.80), (0.94, 0.74)),
)  # fmt: skip
SWIRL_TAIL = ((0.60, 0.60), (0.72, 0.62), (0.81, 0.46), (0.86, 0.60), (0.94, 0.55))
# No character of any script: it only looks like one.
SEAL = (
    ((0.22, 0.24), (0.50, 0.22), (0.78, 0.24)),
    ((0.50, 0.23), (0.50, 0.42), (0.50, 0.58)),
    ((0.24, 0.44), (0.50, 0.41), (0.76, 0.44)),
    ((0.26, 0.62), (0.26, 0.72), (0.30, 0.78), (0.50, 0.79), (0.70, 0.78), (0.74, 0.72), (0.74, 0.62)),
)


def draw_signatures(folder: Path) -> dict[str, Path]:
    """Write the signatures as RGBA PNGs into `folder`, which exists; return their paths by name."""
    drawn = {"monogram": _monogram(), "seal": _seal(), "swirl": _swirl()}
    paths = {name: folder / f"{name}.png" for name in drawn}
    for name, image in drawn.items():
        image.crop(image.getbbox()).save(paths[name])
    return paths


def _monogram() -> Image.Image:
    return _inked([_spline(stroke) for stroke in MONOGRAM], pen=_nib)


def _swirl() -> Image.Image:
    """Draw a spiral that runs out into a flourish."""
    turns = [math.tau * step / 24 for step in range(49)]
    spiral = [(0.34 + 0.018 * turn * math.cos(turn), 0.40 + 0.018 * turn * math.sin(turn)) for turn in turns]
    return _inked([_spline((*spiral, *SWIRL_TAIL))], pen=_nib)


def _seal() -> Image.Image:
    """Draw a stamp: light strokes cut out of a red square with rounded corners."""
    stamp = Image.new("L", (SIDE * SUPERSAMPLING,) * 2)
    edge = 0.06 * stamp.width
    ImageDraw.Draw(stamp).rounded_rectangle(
        (edge, edge, stamp.width - edge, stamp.height - edge), radius=0.12 * stamp.width, fill=255
    )
    cut = _strokes([_spline(stroke) for stroke in SEAL], pen=lambda _: 0.04)
    red = Image.new("RGBA", (SIDE, SIDE), (*VERMILION, 0))
    red.putalpha(_reduced(stamp))
    light = Image.new("RGBA", (SIDE, SIDE), (*LIGHT, 0))
    light.putalpha(_reduced(cut))
    return Image.alpha_composite(red, light)


def _inked(strokes: Iterable[Iterable[Point]], *, pen: Callable[[float], float]) -> Image.Image:
    """Draw strokes in dark ink on a light rim."""
    ink = _reduced(_strokes(strokes, pen=pen))
    rim = ink.filter(ImageFilter.MaxFilter(2 * HALO_PX + 1)).filter(ImageFilter.GaussianBlur(HALO_PX / 3))
    image = Image.composite(Image.new("RGB", ink.size, INK), Image.new("RGB", ink.size, LIGHT), ink).convert("RGBA")
    image.putalpha(ImageChops.lighter(ink, rim))
    return image


def _strokes(strokes: Iterable[Iterable[Point]], *, pen: Callable[[float], float]) -> Image.Image:
    """Compute the coverage of strokes by a round pen of radius `pen(direction)`, supersampled; lengths in unit
    squares.
    """
    canvas = Image.new("L", (SIDE * SUPERSAMPLING,) * 2)
    draw = ImageDraw.Draw(canvas)
    for stroke in strokes:
        for (x, y), (next_x, next_y) in pairwise(stroke):
            radius = pen(math.atan2(next_y - y, next_x - x)) * canvas.width
            left, top = x * canvas.width, y * canvas.height
            draw.ellipse((left - radius, top - radius, left + radius, top + radius), fill=255)
    return canvas


def _nib(lean: float) -> float:
    """Compute the radius of a broad nib held at 45 degrees: down strokes are thick, up strokes thin."""
    return 0.016 + 0.014 * abs(math.sin(lean + math.pi / 4))


def _reduced(canvas: Image.Image) -> Image.Image:
    return canvas.reduce(SUPERSAMPLING)


def _spline(points: tuple[Point, ...]) -> list[Point]:
    """Sample the uniform Catmull-Rom spline through `points`."""
    padded = (points[0], *points, points[-1])
    return [
        (_between(*xs, t=step / POINTS_PER_SEGMENT), _between(*ys, t=step / POINTS_PER_SEGMENT))
        for xs, ys in (
            zip(*four, strict=True) for four in zip(padded, padded[1:], padded[2:], padded[3:], strict=False)
        )
        for step in range(POINTS_PER_SEGMENT)
    ]


def _between(before: float, start: float, end: float, after: float, *, t: float) -> float:
    a = 2 * start
    b = (end - before) * t
    c = (2 * before - 5 * start + 4 * end - after) * t**2
    d = (3 * start - before - 3 * end + after) * t**3
    return (a + b + c + d) / 2
