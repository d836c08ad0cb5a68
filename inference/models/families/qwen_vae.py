"""Base of the families with Qwen-Image's VAE: one of videos, with a mean and a deviation for each channel."""

from collections.abc import Mapping
from typing import Any

import torch

from inference.device.uploads import upload
from inference.latents.frame_vae import FrameVae
from inference.lora.adapter_memory import AdapterMemory
from inference.models.families.flow import FlowFamily

# In pixels, where no config says it.
BASE_SIZE = 1024


class QwenVaeFamily(FlowFamily):
    """Families with an `AutoencoderKLQwenImage`, in place of FLUX.1's VAE."""

    is_vae_of_images = False

    def __init__(
        self, pipeline: Any, models: Mapping[str, torch.nn.Module], *, device: torch.device, memory: AdapterMemory
    ) -> None:
        super().__init__(pipeline, models, device=device, memory=memory)
        self._frames = FrameVae(pipeline.vae)
        config = pipeline.vae.config
        # [channels, 1, 1], on the device from the start: they are used between steps.
        self._mean, self._deviation = (
            upload(torch.tensor(values)[:, None, None], device) for values in (config.latents_mean, config.latents_std)
        )

    @property
    def base_size(self) -> int:
        return int(self._pipeline.vae.config.get("sample_size", BASE_SIZE))

    @property
    def _vae(self) -> Any:
        return self._frames

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        deviation, mean = (one.to(latents) for one in (self._deviation, self._mean))
        return latents * deviation + mean

    def _scaled(self, latents: torch.Tensor) -> torch.Tensor:
        return (latents - self._mean) / self._deviation
