"""A VAE of videos, as a VAE of images: of one frame, without the axis of frames."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from inference.checkpoints.offload import ensure_on_device


class FramePosterior(NamedTuple):
    """The distribution of a frame's latents, [number, channels, height, width] each."""

    mean: torch.Tensor
    std: torch.Tensor

    def mode(self) -> torch.Tensor:
        return self.mean


class Encoded(NamedTuple):
    latent_dist: FramePosterior


class FrameVae:
    """An `AutoencoderKLQwenImage` with the interface of an `AutoencoderKL`, as far as a family uses it."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae
        # As many halvings of the image's side as between the blocks of an AutoencoderKL.
        self.config = SimpleNamespace(block_out_channels=vae.config.dim_mult)

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self._vae.dtype
        return found

    @property
    def encoder(self) -> Any:
        """Its encoder, which is on the device now."""
        ensure_on_device(self._vae)
        return self._vae.encoder

    @property
    def quant_conv(self) -> Any:
        return self._vae.quant_conv

    @property
    def use_tiling(self) -> bool:
        return bool(self._vae.use_tiling)

    @use_tiling.setter
    def use_tiling(self, is_on: bool) -> None:
        self._vae.use_tiling = is_on

    def encode(self, images: torch.Tensor, *, return_dict: bool = True) -> Encoded:
        """Encode images [number, 3, height, width]."""
        found = self._vae.encode(images[:, :, None], return_dict=False)[0]
        return Encoded(FramePosterior(found.mean[:, :, 0], found.std[:, :, 0]))

    def decode(self, latents: torch.Tensor, *, return_dict: bool) -> tuple[torch.Tensor]:
        """Decode latents [number, channels, height, width] to images [number, 3, height, width]."""
        return (self._vae.decode(latents[:, :, None], return_dict=False)[0][:, :, 0],)
