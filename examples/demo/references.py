"""What the demo's jobs bring for their drawing: a ball, half of it masked, and a bottle cut out; drawn, not stored."""

from pathlib import Path

from PIL import Image, ImageDraw

SIDE = 256
SUPERSAMPLING = 4
ORANGE, BLUE = "#f08c28", "#3c5ac8"
GLASS, LABEL, CAP, SHINE = "#1f7a4d", "#fff3d6", "#7a1030", "#8fd9b4"

# Left, top, right, bottom, the corners' radius and the colour of its parts, from the back.
BOTTLE = (
    ((44, 4, 76, 30), 6, CAP),
    ((46, 26, 74, 120), 10, GLASS),
    ((18, 84, 102, 252), 26, GLASS),
    ((28, 104, 36, 236), 4, SHINE),
    ((18, 140, 102, 206), 0, LABEL),
    ((40, 164, 80, 182), 9, CAP),
)


def draw_references(folder: Path) -> dict[str, Path]:
    """Write the pictures as PNGs into `folder`, which exists; return their paths by name."""
    drawn = {"ball": _ball(), "left-half": _left_half(), "bottle": _bottle()}
    paths = {name: folder / f"{name}.png" for name in drawn}
    for name, image in drawn.items():
        image.save(paths[name])
    return paths


def _ball() -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), BLUE)
    ImageDraw.Draw(image).ellipse((36, 36, SIDE - 36, SIDE - 36), ORANGE)
    return image


def _left_half() -> Image.Image:
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (0, 0, SIDE // 2, SIDE))
    return mask


def _bottle() -> Image.Image:
    """Draw a green bottle with a label on a transparent ground."""
    large = Image.new("RGBA", (120 * SUPERSAMPLING, 256 * SUPERSAMPLING))
    pen = ImageDraw.Draw(large)

    for box, radius, colour in BOTTLE:
        pen.rounded_rectangle([side * SUPERSAMPLING for side in box], radius * SUPERSAMPLING, colour)
    return large.resize((120, 256), Image.Resampling.LANCZOS)
