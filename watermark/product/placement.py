"""Placement of a product on its background. Pure."""

from dataclasses import dataclass

from PIL import Image

from watermark.geometry import ANCHORS, Position, Rect
from watermark.quiet_region import quietest_region

# Margin, as a fraction of the image's shorter side, as far as the product leaves it.
MARGIN = 0.05
# Fraction of the free height above an automatically placed product: products look right low in the image.
LOW = 0.8


@dataclass(frozen=True, slots=True)
class Layout:
    """Size and anchor of a product: at most `scale` of the image each way; None is the background's quietest side."""

    scale: float
    position: Position | None


def place_product(background: Image.Image, product: tuple[int, int], layout: Layout) -> Rect:
    """Return the rectangle of `background` for a product of `product` (width, height) px.

    It keeps the product's aspect ratio and is inside the image, whatever the layout.
    """
    size = fitted_size(background.size, product, layout.scale)
    # The image without its margins, which shrink where the product needs them.
    margin = round(MARGIN * min(background.size))
    across, down = (min(margin, (whole - part) // 2) for whole, part in zip(background.size, size, strict=True))
    room = Rect(across, down, background.width - across, background.height - down)
    if layout.position is None:
        # In the middle of the quietest half behind the product, which is the centre of a uniform image.
        top = _between(room.top, room.bottom - size[1], LOW)
        side = max(background.width // 2, size[0])
        rows = Rect(0, top, background.width, top + size[1])
        start, _ = quietest_region(background, (side, size[1]), within=rows)
        left = min(max(start + (side - size[0]) // 2, room.left), room.right - size[0])
    else:
        vertical, _, horizontal = layout.position.partition("-")
        left = _between(room.left, room.right - size[0], ANCHORS[horizontal or vertical])
        top = _between(room.top, room.bottom - size[1], ANCHORS[vertical])
    return Rect(left, top, left + size[0], top + size[1])


def fitted_size(image: tuple[int, int], product: tuple[int, int], scale: float) -> tuple[int, int]:
    """Return the size, in px, at which a product fills at most `scale` of an image each way."""
    factor = scale * min(image[0] / product[0], image[1] / product[1])
    width, height = (max(1, round(side * factor)) for side in product)
    return min(width, image[0]), min(height, image[1])


def _between(first: int, last: int, share: float) -> int:
    return first + round((last - first) * share)
