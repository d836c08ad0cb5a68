"""The pictures: SVG shapes drawn large, made small, and kept as RGBA so that any ground can be put behind them."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import resvg_py
import safetensors.torch
import torch
from PIL import Image
from tqdm import tqdm

from examples.demo_model.recipe.grounds import NAMED, WHITE
from examples.demo_model.recipe.reference import References, means_of
from examples.demo_model.recipe.settings import SIDE, Workspace, bar_seconds
from examples.demo_model.recipe.styles import on_ground
from examples.demo_model.recipe.things import read_things

# Four times as large as they are kept: edges come out smooth and always in the same way.
OVERSAMPLING = 4


def render(workspace: Workspace) -> dict[str, object]:
    """Leave every thing's picture (uint8 RGBA by icon), and the references of the score."""
    icons = json.loads(workspace.icons.read_text())
    things = read_things(workspace.budget.num_things)
    images = {
        thing.icon: draw_icon(icons["icons"][thing.icon]["body"], icons["width"], icons["height"])
        for thing in tqdm(things, desc="render", mininterval=bar_seconds())
    }
    safetensors.torch.save_file(images, workspace.images)
    shown = [on_white(images[thing.icon]) for thing in things]
    References(tuple(thing.name for thing in things), np.stack([means_of(one) for one in shown])).save(
        workspace.references
    )
    return {"num_images": len(images)}


def draw_icon(body: str, width: int, height: int) -> torch.Tensor:
    """Render the inside of an SVG with this view box: uint8 RGBA, shape (4, SIDE, SIDE)."""
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIDE * OVERSAMPLING, skip_system_fonts=True)
    image = Image.open(BytesIO(png)).convert("RGBA").resize((SIDE, SIDE), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous()


def load_images(path: Path, device: torch.device | None = None) -> torch.Tensor:
    """Load all images in the order of `names.txt`: float RGBA in 0..1, shape (things, 4, SIDE, SIDE)."""
    images = safetensors.torch.load_file(path)
    ordered = torch.stack([images[thing.icon] for thing in read_things() if thing.icon in images])
    return (ordered.float() / 255).to(device)


def on_white(image: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Composite a uint8 RGBA image for "on a white background": RGB, shape (SIDE, SIDE, 3)."""
    red, green, blue = (value / 255 for value in NAMED[WHITE].rgb)
    shown = on_ground(image.float() / 255, (red, green, blue))
    return (shown * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
