"""Composite a product and its contact shadow onto a background. Pure: the same input gives the same bytes."""

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from watermark.geometry import Rect
from watermark.product.cutout import resize_premultiplied

# The lowest part of the product's height, which casts the contact shadow.
FOOT = 0.12
# Height and blur radius of that shadow as fractions of the product's width: a dark rim right under the foot, and a soft
# one around it that is half as dark.
CONTACT_HEIGHT, CONTACT_BLUR = 0.03, 0.015
SOFT_HEIGHT, SOFT_BLUR, SOFT_DARKNESS = 0.14, 0.06, 0.55


def compose(background: Image.Image, product: Image.Image, place: Rect, *, shadow: float) -> Image.Image:
    """Composite the RGBA `product`, resized to `place`, over an RGB `background` and its contact shadow.

    `shadow` is the opacity of the shadow's darkest part, 0 for none. Opaque product pixels and the background outside
    product and shadow are kept to the byte.
    """
    image = background.copy()
    placed = resize_premultiplied(product, place.size)
    if shadow > 0:
        _darken(image, placed.getchannel("A"), place, shadow)
    # Porter and Duff's "over", exact where alpha is 0 or 255.
    image.paste(placed, place[:2], placed)
    return image


def _darken(image: Image.Image, alpha: Image.Image, place: Rect, opacity: float) -> None:
    """Darken the background around the product's foot, in place."""
    width, height = place.size
    # The part of the image that the shadow can reach.
    reach = round(width * (SOFT_HEIGHT + 3 * SOFT_BLUR)) + 3
    around = Rect(
        max(0, place.left - reach),
        max(0, place.bottom - round(height * FOOT) - reach),
        min(image.width, place.right + reach),
        min(image.height, place.bottom + reach),
    )
    contact = _shade(alpha, place, around, CONTACT_HEIGHT, CONTACT_BLUR, darkness=1.0)
    soft = _shade(alpha, place, around, SOFT_HEIGHT, SOFT_BLUR, darkness=SOFT_DARKNESS)
    light = ImageChops.lighter(contact, soft).point([round(255 - opacity * shade) for shade in range(256)])
    lit = ImageChops.multiply(image.crop(around), Image.merge("RGB", [light] * 3))
    image.paste(lit, around[:2])


def _shade(
    alpha: Image.Image, place: Rect, around: Rect, height: float, blur: float, *, darkness: float
) -> Image.Image:
    """Return the shadow over `around`, mode L, at most `darkness` of 255: the product's foot, flattened and blurred."""
    width, tall = place.size
    foot = alpha.crop((0, tall - max(1, round(tall * FOOT)), width, tall))
    flat = foot.resize((width, max(1, round(width * height))), Image.Resampling.BOX)
    shade = Image.new("L", around.size)
    shade.paste(flat, (place.left - around.left, place.bottom - around.top - (flat.height + 1) // 2))
    blurred = shade.filter(ImageFilter.GaussianBlur(width * blur))
    factor = darkness * 255 / max(1, int(np.asarray(blurred).max()))
    return blurred.point([min(255, round(value * factor)) for value in range(256)])
