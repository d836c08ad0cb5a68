"""Sample grids: what the model draws, for people to look at."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from examples.demo_model.recipe.captions import STYLE_WORDS
from examples.demo_model.recipe.drawing import ImagePrompt, generator_for
from examples.demo_model.recipe.samples import HANGUL_SUBJECTS, PROMPTS, SUBJECTS
from examples.demo_model.recipe.settings import SIDE, Workspace
from examples.demo_model.recipe.styles import STYLES

GAP, CAPTION_HEIGHT = 4, 18
FONTS = ("/usr/share/fonts/truetype/nanum/NanumGothic.ttf",)
FONT_SIZE = 11


def draw_grids(workspace: Workspace) -> dict[str, object]:
    """Leave `grid-base.png`, `grid-styles.png` and `grid-hangul.png`."""
    grids = {
        "base": [ImagePrompt(prompt, num_steps=workspace.budget.sample_steps) for prompt in PROMPTS],
        "styles": _styled(workspace, SUBJECTS, language=0),
        "hangul": _styled(workspace, HANGUL_SUBJECTS, language=1),
    }
    with generator_for(workspace.checkpoint, workspace.device.type) as generator:
        for name, prompts in grids.items():
            images = generator.draw(prompts, desc=f"grid-{name}")
            draw_grid(images, [prompt.prompt for prompt in prompts], workspace.out / f"grid-{name}.png")
    return {"num_images": sum(map(len, grids.values()))}


def draw_grid(images: Sequence[npt.NDArray[np.uint8]], captions: Sequence[str], path: Path, columns: int = 8) -> None:
    """Write a PNG of the pictures in rows, each over its caption."""
    width, height = SIDE + GAP, SIDE + CAPTION_HEIGHT
    sheet = Image.new("RGB", (columns * width - GAP, -(-len(images) // columns) * height), "white")
    pen, font = ImageDraw.Draw(sheet), _font()
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = number % columns * width, number // columns * height
        sheet.paste(Image.fromarray(image), (left, top))
        while pen.textlength(caption, font=font) > SIDE:
            caption = caption[:-1]  # noqa: PLW2901
        pen.text((left + 2, top + SIDE + 2), caption, "black", font=font)
    sheet.save(path)


def _styled(workspace: Workspace, subjects: Sequence[str], *, language: int) -> list[ImagePrompt]:
    """Draw the subjects without a style, then in each."""
    steps = workspace.budget.sample_steps
    styled = [
        ImagePrompt(
            f"{STYLE_WORDS[style][language]}: {subject}", workspace.adapters / f"{style}.safetensors", num_steps=steps
        )
        for style in STYLES
        for subject in subjects
    ]
    return [ImagePrompt(subject, num_steps=steps) for subject in subjects] + styled


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Load a font, one with Hangul where the machine has it."""
    for path in FONTS:
        if Path(path).exists():
            return ImageFont.truetype(path, FONT_SIZE)
    return ImageFont.load_default(FONT_SIZE)
