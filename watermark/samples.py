"""Convert a decoded image to 8 bits a sample, and a transparent key colour to alpha."""

import numpy as np
from PIL import Image

# The plain mode that each other Pillow mode is converted to; 16 bits are scaled, 32 are refused.
EXPANDED = {"1": "L", "YCbCr": "RGB", "RGBX": "RGB", "RGBa": "RGBA", "La": "LA", "PA": "RGBA"}
# The modes that `to_8_bits` takes, beside those of 16 bits, which begin with I;16.
SUPPORTED_MODES = frozenset({"RGB", "RGBA", "L", "LA", "CMYK", "LAB", "P", *EXPANDED})


def to_8_bits(image: Image.Image) -> Image.Image:
    """Convert `image` to 8 bits a sample: RGB, RGBA, L, LA, CMYK or LAB; a transparent key colour becomes alpha."""
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255, so that all but black turns white.
        samples = np.asarray(image).astype(np.uint32)
        grey = Image.fromarray(((samples + 128) // 257).clip(0, 255).astype(np.uint8))
        if (key := image.info.get("transparency")) is not None:
            grey.putalpha(Image.fromarray(np.where(samples == key, 0, 255).astype(np.uint8)))
        grey.info = {name: value for name, value in image.info.items() if name != "transparency"}
        return grey
    if image.mode == "P":
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    if image.mode in EXPANDED:
        image = image.convert(EXPANDED[image.mode])
    if image.info.get("transparency") is not None and image.mode in ("L", "RGB"):
        return image.convert("LA" if image.mode == "L" else "RGBA")
    return image
