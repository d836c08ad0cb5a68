"""Preview images of latents by one matrix in place of the VAE's decoder.

To a good approximation latents are linear in the colours of their 8x8 pixels: least squares over the encodings of a few
known images finds the colour of a latent pixel.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import interpolate

from config.logs import log_event

logger = logging.getLogger(__name__)

# Smooth fields of colour at several scales: 2 x 1024 latent pixels, of all colours. Sharp patches fit worse, as one
# latent pixel does not represent an edge.
NUM_IMAGES = 2
PIXELS = 256
GRAINS = (2, 4, 8)
# Before tanh: a field comes close to black and white here and there.
CONTRAST = 3.0


class Projection:
    """Linear map of latent pixels to colours, `weights` [3, channels] and `bias` [3], black at -1 and white at 1."""

    def __init__(self, weights: torch.Tensor, bias: torch.Tensor) -> None:
        self._weights = weights
        self._bias = bias[:, None]

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """Return latents [channels, height, width], in the sampler's scale, as bytes [height, width, 3]."""
        _, height, width = latents.shape
        colours = torch.addmm(self._bias, self._weights, latents.flatten(1))
        return ((colours.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).T.reshape(height, width, 3)


def find_projection(
    vae: Any, unscaled: Callable[[torch.Tensor], torch.Tensor], device: torch.device, *, has_frames: bool = False
) -> Projection:
    """Encode known images and regress their colours on their latents; tenths of a second on a GPU.

    `unscaled` converts latents [1, channels, height, width] from the sampler's scale to the VAE's, by channel.
    `has_frames`: the VAE reads an image as the single frame of a video.
    """
    started_at = time.monotonic()
    generator = torch.Generator().manual_seed(0)
    # Random images [number, 3, height, width] from -1 to 1, of coarse and fine grain.
    coarse = (torch.randn(NUM_IMAGES, 3, grain, grain, generator=generator) for grain in GRAINS)
    fields = torch.stack([interpolate(one, size=(PIXELS, PIXELS), mode="bicubic") for one in coarse])
    images = torch.tanh(CONTRAST * fields.sum(0) / len(GRAINS) ** 0.5)
    read = images.to(device, vae.dtype)
    encoded = vae.encode(read[:, :, None] if has_frames else read, return_dict=False)[0].mode().cpu()
    if has_frames:
        encoded = encoded[:, :, 0]
    colours = interpolate(images, size=encoded.shape[-2:], mode="area")
    # Colours [n, 3] on latents [n, channels]; `explained` is the share of the colours' variance.
    inputs, targets = _pixels_of(encoded), _pixels_of(colours)
    with_one = torch.cat((inputs, inputs.new_ones(len(inputs), 1)), dim=1)
    found = torch.linalg.lstsq(with_one, targets).solution
    weights, bias = found[:-1].T, found[-1]
    explained = 1 - float((targets - with_one @ found).var() / targets.var())

    # The scale of each channel is folded in, at no cost per preview.
    shift = unscaled(torch.zeros(1, encoded.shape[1], 1, 1)).double().flatten()
    scale = unscaled(torch.ones(1, encoded.shape[1], 1, 1)).double().flatten() - shift
    log_event(logger, "previews fitted", seconds=round(time.monotonic() - started_at, 2), explained=round(explained, 3))
    return Projection((weights * scale).float().to(device), (bias + weights @ shift).float().to(device))


def _pixels_of(images: torch.Tensor) -> torch.Tensor:
    """Reshape [number, channels, height, width] to [pixels, channels] in 64 bits."""
    return images.permute(0, 2, 3, 1).flatten(0, 2).double()
