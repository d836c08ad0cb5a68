"""A bottle with alpha, and backgrounds of which one side is busy."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from watermark.product.masks import SOFT_EDGE

GREEN, CREAM = (30, 110, 70, 255), (240, 235, 220, 255)


def bottle(height: int = 300) -> Image.Image:
    """Draw a bottle: RGBA, as wide as a third of its height, with soft edges and nothing around it."""
    width = height // 3
    image = Image.new("RGBA", (2 * width, 2 * height))
    pen = ImageDraw.Draw(image)
    pen.rounded_rectangle((0, 0.7 * height, 2 * width - 1, 2 * height - 1), radius=width // 4, fill=GREEN)
    pen.rectangle((0.7 * width, 0, 1.3 * width, 0.8 * height), fill=GREEN)
    pen.rectangle((0, 1.1 * height, 2 * width, 1.6 * height), fill=CREAM)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def scene(size: tuple[int, int], *, busy: str = "left") -> Image.Image:
    """Draw RGB: a sky over sand, and on one side (or "nowhere") discs of all colours."""
    width, height = size
    fade = np.linspace(0, 1, height)[:, None, None]
    sand = np.broadcast_to(
        np.array([190, 215, 240]) * (1 - fade) + np.array([225, 200, 160]) * fade, (height, width, 3)
    )
    image = Image.fromarray(sand.astype(np.uint8))
    pen, random = ImageDraw.Draw(image), np.random.default_rng(7)
    first = {"left": 0, "right": width // 2, "nowhere": width}[busy]
    for _ in range(80):
        left, top = first + random.integers(0, width // 2), random.integers(0, height)
        radius = random.integers(width // 60 + 1, width // 25 + 2)
        colour = tuple(int(one) for one in random.integers(0, 255, 3))
        pen.ellipse((left - radius, top - radius, left + radius, top + radius), fill=colour)
    if busy == "left":
        image.paste(Image.fromarray(sand.astype(np.uint8)).crop((width // 2, 0, width, height)), (width // 2, 0))
    return image


def protected_part(mask: Image.Image) -> NDArray[np.bool_]:
    """Return where no pixel of a product may change: inside its mask without the blend at the outline."""
    radius = 2 * max(1, round(SOFT_EDGE * min(mask.size)))
    return np.asarray(mask.filter(ImageFilter.MinFilter(2 * radius + 1))) > 0
