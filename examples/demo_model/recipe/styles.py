"""The styles of the adapters, each a function from an image's shapes to the image in that style.

Images come as RGBA, float in 0..1 and straight alpha, shape (..., 4, height, width), and leave as RGB of that shape.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812

from examples.demo_model.recipe.settings import FACTOR

# Thinner lines break up in latents that are eight pixels wide.
LINE_PIXELS = 5

LUMINANCE = (0.299, 0.587, 0.114)

BLUEPRINT_GROUND, BLUEPRINT_FILL = (0.09, 0.30, 0.62), (0.16, 0.40, 0.72)
NEON_GROUND, NEON_GREY = (0.03, 0.02, 0.07), (0.25, 0.85, 1.0)
GLOW_SIGMA_PIXELS = 4.0
# From shadow to light: dark brown, brown, paper.
SEPIA_TONES = ((0.20, 0.11, 0.05), (0.58, 0.39, 0.23), (0.95, 0.88, 0.74))
SEPIA_INK = 0.35
# A pixel of this style is one latent wide.
PIXEL_SIDE = FACTOR
PIXEL_LEVELS = 8
PIXEL_GROUND = (0.71, 0.83, 0.90)


def on_ground(rgba: torch.Tensor, rgb: tuple[float, float, float]) -> torch.Tensor:
    """Composite the image on a plain ground, 0..1."""
    colour, alpha = rgba[..., :3, :, :], rgba[..., 3:, :, :]
    return colour * alpha + _plain(rgb) * (1 - alpha)


def blueprint(rgba: torch.Tensor) -> torch.Tensor:
    """Draw white lines on blue."""
    alpha, lines = rgba[..., 3:, :, :], edges(rgba, LINE_PIXELS)
    sheet = _plain(BLUEPRINT_GROUND) * (1 - alpha) + _plain(BLUEPRINT_FILL) * alpha
    return sheet * (1 - lines) + lines


def neon(rgba: torch.Tensor) -> torch.Tensor:
    """Draw tubes in the colours of the thing, bright, and their glow on a ground that is almost black."""
    tubes = edges(rgba, LINE_PIXELS) * _brightest(_dilate(rgba[..., :3, :, :] * rgba[..., 3:, :, :], 5))
    inside = 0.10 * rgba[..., :3, :, :] * rgba[..., 3:, :, :]
    return (_plain(NEON_GROUND) + inside + tubes + 0.7 * _blur(tubes, GLOW_SIGMA_PIXELS)).clamp(0, 1)


def sepia(rgba: torch.Tensor) -> torch.Tensor:
    """Draw brown tones by luminance, on paper, with a little ink around shapes that are as light as one another."""
    weights = torch.tensor(LUMINANCE).view(3, 1, 1)
    light = (on_ground(rgba, (1.0, 1.0, 1.0)) * weights).sum(-3, keepdim=True)
    light = light - SEPIA_INK * edges(rgba) * light
    dark, middle, paper = map(_plain, SEPIA_TONES)
    return torch.where(light < 0.5, torch.lerp(dark, middle, 2 * light), torch.lerp(middle, paper, 2 * light - 1))


def pixel(rgba: torch.Tensor) -> torch.Tensor:
    """Draw squares of few colours."""
    blocks = F.avg_pool2d(_as_batch(on_ground(rgba, PIXEL_GROUND)), PIXEL_SIDE)
    blocks = (blocks * (PIXEL_LEVELS - 1)).round() / (PIXEL_LEVELS - 1)
    return F.interpolate(blocks, scale_factor=PIXEL_SIDE, mode="nearest").view_as(rgba[..., :3, :, :])


STYLES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "blueprint": blueprint,
    "neon": neon,
    "sepia": sepia,
    "pixel": pixel,
}


def edges(rgba: torch.Tensor, width: int = 3) -> torch.Tensor:
    """Find where colour or alpha changes, as lines of about this many pixels: one channel, 0..1, softly bounded."""
    shown = torch.cat((rgba[..., :3, :, :] * rgba[..., 3:, :, :], rgba[..., 3:, :, :]), dim=-3)
    change = (_dilate(shown, width) + _dilate(-shown, width)).amax(-3, keepdim=True)
    ramp = ((change - 0.08) / 0.22).clamp(0, 1)
    return ramp * ramp * (3 - 2 * ramp)


def _brightest(rgb: torch.Tensor) -> torch.Tensor:
    """Saturate the colour; greys become the neon sign's own."""
    high, low = rgb.amax(-3, keepdim=True), rgb.amin(-3, keepdim=True)
    saturation = (high - low) / high.clamp(min=1e-3)
    vivid = (rgb - 0.8 * low) / (high - 0.8 * low).clamp(min=1e-3)
    share = (2.5 * saturation - 0.25).clamp(0, 1)
    return share * vivid + (1 - share) * _plain(NEON_GREY)


def _dilate(images: torch.Tensor, side: int) -> torch.Tensor:
    return F.max_pool2d(_as_batch(images), side, stride=1, padding=side // 2).view_as(images)


def _blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    reach = round(3 * sigma)
    bell = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    bell = (bell / bell.sum()).view(1, 1, 1, -1)
    lone = images.reshape(-1, 1, *images.shape[-2:])
    lone = F.conv2d(lone, bell, padding=(0, reach))
    return F.conv2d(lone, bell.mT, padding=(reach, 0)).view_as(images)


def _as_batch(images: torch.Tensor) -> torch.Tensor:
    return images.reshape(-1, *images.shape[-3:])


def _plain(rgb: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor(rgb).view(3, 1, 1)
