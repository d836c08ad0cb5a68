"""From latents to a small picture without the VAE's decoder: one matrix, found on the VAE's own encodings.

To a good approximation latents are linear in the colours of their 8x8 pixels, so that least squares over a few known
pictures finds what a decoder would say of each latent pixel alone.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import interpolate

from config.logs import log_event

logger = logging.getLogger(__name__)

# Soft fields of colour in several grains: 2 x 1024 latent pixels, and among them every colour. Sharp patches fit worse,
# as what a latent pixel says of an edge is lost on one of its own.
NUM_PICTURES = 2
PIXELS = 256
GRAINS = (2, 4, 8)
# Before tanh: a field comes close to black and white here and there.
CONTRAST = 3.0


class Projection:
    """A colour for each latent pixel, `weights` [3, channels] and `bias` [3], black at -1 and white at 1."""

    def __init__(self, weights: torch.Tensor, bias: torch.Tensor) -> None:
        self._weights = weights
        self._bias = bias[:, None]

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [channels, height, width], in the sampler's scale, as a picture [height, width, 3] of bytes."""
        _, height, width = latents.shape
        colours = torch.addmm(self._bias, self._weights, latents.flatten(1))
        return ((colours.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).T.reshape(height, width, 3)


def find_projection(vae: Any, unscaled: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> Projection:
    """Encode pictures that are known and regress their colours on their latents; some tenths of a second on a GPU.

    `unscaled` brings latents [1, channels, height, width] from the sampler's scale into the VAE's, channel by channel.
    """
    started_at = time.monotonic()
    pictures = _colour_fields(torch.Generator().manual_seed(0))
    encoded = vae.encode(pictures.to(device, vae.dtype), return_dict=False)[0].mode().cpu()
    colours = interpolate(pictures, size=encoded.shape[-2:], mode="area")
    weights, bias, explained = _regress(_pixels_of(encoded), _pixels_of(colours))

    # What scales each channel is folded in, and costs a preview nothing.
    shift = unscaled(torch.zeros(1, encoded.shape[1], 1, 1)).double().flatten()
    scale = unscaled(torch.ones(1, encoded.shape[1], 1, 1)).double().flatten() - shift
    log_event(logger, "previews fitted", seconds=round(time.monotonic() - started_at, 2), explained=round(explained, 3))
    return Projection((weights * scale).float().to(device), (bias + weights @ shift).float().to(device))


def _colour_fields(generator: torch.Generator) -> torch.Tensor:
    """Pictures [number, 3, height, width] from -1 to 1."""
    size = (PIXELS, PIXELS)
    coarse = (torch.randn(NUM_PICTURES, 3, grain, grain, generator=generator) for grain in GRAINS)
    fields = torch.stack([interpolate(one, size=size, mode="bicubic") for one in coarse])
    return torch.tanh(CONTRAST * fields.sum(0) / len(GRAINS) ** 0.5)


def _pixels_of(images: torch.Tensor) -> torch.Tensor:
    """[number, channels, height, width] as [pixels, channels] in 64 bits."""
    return images.permute(0, 2, 3, 1).flatten(0, 2).double()


def _regress(inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Least squares of `targets` [n, 3] on `inputs` [n, channels]: weights [3, channels], bias [3], and the share of
    the targets' variance that they explain."""
    with_one = torch.cat((inputs, inputs.new_ones(len(inputs), 1)), dim=1)
    found = torch.linalg.lstsq(with_one, targets).solution
    explained = 1 - float((targets - with_one @ found).var() / targets.var())
    return found[:-1].T, found[-1], explained
