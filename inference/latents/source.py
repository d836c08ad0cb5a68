"""Encode a source image to latents, once for a request, and sample each lane's start from it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from inference.checkpoints.offload import ensure_on_device
from inference.request import Source
from inference.sampling.source_blend import SourceLatents

# Threshold of a mask's bytes, as diffusers rounds them: from this value on, the image is repainted.
REPAINTED = 128


class Posterior(NamedTuple):
    """The VAE's distribution of latents for an image, [channels, height, width] each, fp32."""

    mean: torch.Tensor
    deviation: torch.Tensor

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        return self.mean + self.deviation * noise


@dataclass(frozen=True, slots=True)
class EncodedSource:
    """A request's encoded source.

    `image` is None where the denoiser never reads it; `masked_image`, without the repainted part, is there for an
    inpainting denoiser. `mask` [1, height, width] in latent pixels: true where it is repainted. `is_hidden` as in
    `SourceLatents`.
    """

    image: Posterior | None
    masked_image: Posterior | None
    mask: torch.Tensor | None
    is_hidden: bool

    def begin(
        self, draw: Callable[[], torch.Tensor], scale: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, SourceLatents]:
        """Return a lane's noise, and the latents from which it starts.

        `draw` returns standard normal noise of the latents' shape. It is called as often as diffusers' pipelines draw,
        in their order, so that later draws are equal too. `scale` scales the VAE's latents for the denoiser.
        """
        latents = None if self.image is None else scale(self.image.sample(draw()))
        noise = draw()
        if self.mask is None:
            return noise, SourceLatents(latents)
        # diffusers encodes the masked image even for a denoiser that does not read it.
        masked_noise = draw()
        if self.masked_image is None:
            return noise, SourceLatents(latents, self.mask, self.is_hidden)
        channels = torch.cat((self.mask.to(noise.dtype), scale(self.masked_image.sample(masked_noise))))
        return noise, SourceLatents(latents, is_hidden=self.is_hidden, channels=channels)


def encode(
    vae: Any,
    source: Source,
    *,
    size: tuple[int, int],
    is_hidden: bool,
    is_inpainting: bool,
    upload: Callable[[torch.Tensor], torch.Tensor],
    dtype: torch.dtype,
    in_tiles: bool,
) -> EncodedSource:
    """Encode the source of images of this height and width. Tiles take less memory, and are blended.

    `upload` copies a tensor to the device. The encoder runs in `dtype`, whatever its weights are stored in.
    """
    vae.use_tiling = in_tiles
    pixels = upload(_tensor(source.rgb, (*size, 3))).movedim(-1, 0) / 255 * 2 - 1
    mask = None if source.mask is None else upload(_tensor(source.mask, (1, *size))) >= REPAINTED
    masked_image = None
    with _encoder_in(vae, dtype):
        if is_inpainting and mask is not None:
            masked_image = _posterior(vae, pixels * ~mask, dtype)
        image = None if is_inpainting and is_hidden else _posterior(vae, pixels, dtype)
    if mask is not None:
        # A latent pixel is repainted where the first of its pixels is.
        step = 2 ** (len(vae.config.block_out_channels) - 1)
        mask = mask[:, ::step, ::step]
    return EncodedSource(image, masked_image, mask, is_hidden=is_hidden)


def check_size(source: Source, *, size: tuple[int, int]) -> None:
    """Raise ValueError unless the source has the size of the image: callers resize it."""
    num_pixels = size[0] * size[1]
    if len(source.rgb) != 3 * num_pixels or (source.mask is not None and len(source.mask) != num_pixels):
        raise ValueError(f"the source is not of the picture's size, {size[1]}x{size[0]}")


def _tensor(values: bytes, shape: tuple[int, ...]) -> torch.Tensor:
    # A copy: bytes are read-only, which a tensor cannot be.
    return torch.frombuffer(bytearray(values), dtype=torch.uint8).view(shape)


@contextmanager
def _encoder_in(vae: Any, dtype: torch.dtype) -> Iterator[None]:
    """Convert the encoder's weights to `dtype` inside; the originals are restored, which takes no memory."""
    ensure_on_device(vae)  # or offloading would move it inside, and restore weights of another dtype
    parts = [part for part in (vae.encoder, vae.quant_conv) if part is not None]
    kept = [(weight, weight.data) for part in parts for weight in part.parameters()]
    try:
        for weight, own in kept:
            weight.data = own.to(dtype)
        yield
    finally:
        for weight, own in kept:
            weight.data = own


def _posterior(vae: Any, pixels: torch.Tensor, dtype: torch.dtype) -> Posterior:
    """Encode pixels [3, height, width] between -1 and 1."""
    found = vae.encode(pixels[None].to(dtype)).latent_dist
    return Posterior(found.mean[0].float(), found.std[0].float())
