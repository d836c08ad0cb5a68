"""The contact sheet: every picture with its prompt, style, steps and seed."""

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from examples.demo.jobs import DemoJob

# Writes a PNG of the jobs' pictures (PNG bytes by generation id) to the path.
Sheet = Callable[[Sequence[DemoJob], Mapping[int, bytes], Path], None]

COLUMNS = 4
IMAGE_SIDE = 256
GAP = 16
CAPTION_HEIGHT = 44
BACKGROUND, INK, FAINT = "#161616", "#f2f2f2", "#9a9a9a"


def draw_contact_sheet(jobs: Sequence[DemoJob], images: Mapping[int, bytes], path: Path) -> None:
    """Write a PNG of all `images` (PNG bytes by generation id), drawn twice as large as they are."""
    num_rows = -(-len(jobs) // COLUMNS)
    cell = IMAGE_SIDE + GAP, IMAGE_SIDE + CAPTION_HEIGHT + GAP
    sheet = Image.new("RGB", (COLUMNS * cell[0] + GAP, num_rows * cell[1] + GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for index, job in enumerate(jobs):
        left, top = GAP + index % COLUMNS * cell[0], GAP + index // COLUMNS * cell[1]
        image = Image.open(BytesIO(images[job.generation_id])).convert("RGB")
        sheet.paste(image.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.LANCZOS), (left, top))
        seed = "derived seed" if job.seed is None else f"seed {job.seed}"
        detail = f"{job.kind or job.style or 'no adapter'}, {job.steps} steps, {seed}"
        draw.text((left, top + IMAGE_SIDE + 4), job.subject, INK, font=ImageFont.load_default(15))
        draw.text((left, top + IMAGE_SIDE + 24), detail, FAINT, font=ImageFont.load_default(13))
    sheet.save(path)
