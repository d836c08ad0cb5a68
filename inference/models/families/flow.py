"""Base of the families with a flow: a transformer over patches of 2x2 latent pixels predicts its velocity."""

from typing import ClassVar

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from inference.models.base import Family
from inference.request import GenerationRequest

# Latent pixels on a side of one token.
PATCH = 2


class FlowFamily(Family):
    """Families whose pipelines agree in which steps they take, and most in the VAE."""

    is_hidden_at_full_strength = False
    # Tokens of an image at the highest shift, where the scheduler's config does not say it.
    max_image_tokens: ClassVar[int] = 4096

    @property
    def base_size(self) -> int:
        return int(self._pipeline.vae.config.sample_size)

    @property
    def size_multiple(self) -> int:
        return int(self._pipeline.vae_scale_factor * PATCH)

    def num_steps_of(self, request: GenerationRequest) -> int:
        """Return the number of steps taken: its pipelines round the skipped steps, the others' the taken ones."""
        if request.source is None:
            return request.num_inference_steps
        num_steps = request.num_inference_steps
        return num_steps - int(max(num_steps - num_steps * request.source.strength, 0))

    def _num_patches(self, request: GenerationRequest) -> int:
        return (request.height // self.size_multiple) * (request.width // self.size_multiple)

    def _shift(self, request: GenerationRequest) -> float | None:
        config = self._pipeline.scheduler.config
        if not config.use_dynamic_shifting:
            return None
        shift: float = calculate_shift(
            self._num_patches(request),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", self.max_image_tokens),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        return shift

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        return super()._unscaled(latents) + float(self._pipeline.vae.config.shift_factor)

    def _scaled(self, latents: torch.Tensor) -> torch.Tensor:
        return super()._scaled(latents - float(self._pipeline.vae.config.shift_factor))
