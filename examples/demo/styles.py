"""`python -m examples.demo.styles`: eight things, plain and in each style of the demo model, by a real worker."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from examples.demo.contact_sheet import BACKGROUND, FAINT, GAP, INK
from examples.demo.jobs import DemoJob
from examples.demo.main import run_demo
from examples.demo_model.recipe.captions import STYLE_WORDS
from examples.demo_model.recipe.samples import SUBJECTS

STYLES = ("", *STYLE_WORDS)
FIRST_GENERATION_ID = 201
NUM_STEPS, GUIDANCE, SEED = 20, 3.0, 1

IMAGE_SIDE = 144
HEAD_WIDTH, HEAD_HEIGHT = 92, 28

JOBS = tuple(
    DemoJob(subject, style, NUM_STEPS, GUIDANCE, SEED, "", "", generation_id=FIRST_GENERATION_ID + number)
    for number, (style, subject) in enumerate((style, subject) for style in STYLES for subject in SUBJECTS)
)


def draw_style_sheet(jobs: Sequence[DemoJob], images: Mapping[int, bytes], path: Path) -> None:
    """Write a PNG with a column for each thing and a row for each style."""
    cell = IMAGE_SIDE + GAP
    size = HEAD_WIDTH + len(SUBJECTS) * cell, HEAD_HEIGHT + len(STYLES) * cell
    sheet = Image.new("RGB", size, BACKGROUND)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for column, subject in enumerate(SUBJECTS):
        pen.text((HEAD_WIDTH + column * cell, GAP // 2), subject, INK, font=font)
    for row, style in enumerate(STYLES):
        middle = HEAD_HEIGHT + row * cell + IMAGE_SIDE // 2
        pen.text((GAP // 2, middle), style or "no adapter", INK if style else FAINT, font=font, anchor="lm")

    for job in jobs:
        left = HEAD_WIDTH + SUBJECTS.index(job.subject) * cell
        top = HEAD_HEIGHT + STYLES.index(job.style) * cell
        image = Image.open(BytesIO(images[job.generation_id])).convert("RGB")
        sheet.paste(image.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.LANCZOS), (left, top))
    sheet.save(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/styles"))
    return run_demo(parser.parse_args().out, JOBS, draw_style_sheet)


if __name__ == "__main__":
    sys.exit(main())
