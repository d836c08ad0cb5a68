"""Base of the families with Qwen-Image's VAE: one of videos, with a mean and a deviation for each channel."""

from collections.abc import Sequence

import torch

from inference.models.families.flow import FlowFamily

# In pixels, where no config says it.
BASE_SIZE = 1024


class QwenVaeFamily(FlowFamily):
    """Families with an `AutoencoderKLQwenImage`, in place of FLUX.1's VAE."""

    has_frames = True

    @property
    def base_size(self) -> int:
        return int(self._pipeline.vae.config.get("sample_size", BASE_SIZE))

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        config = self._pipeline.vae.config
        return latents * _by_channel(config.latents_std, latents) + _by_channel(config.latents_mean, latents)

    def _scaled(self, latents: torch.Tensor) -> torch.Tensor:
        config = self._pipeline.vae.config
        return (latents - _by_channel(config.latents_mean, latents)) / _by_channel(config.latents_std, latents)


def _by_channel(values: Sequence[float], latents: torch.Tensor) -> torch.Tensor:
    """Return the channels' values as [channels, 1, 1], for latents with or without a batch."""
    return torch.tensor(values, dtype=latents.dtype).to(latents.device, non_blocking=True)[:, None, None]
