"""Start and inpainting blend of a lane with a source image."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from inference.sampling.trajectory import LinearTrajectory


@dataclass(frozen=True, slots=True)
class SourceLatents:
    """The latents from which a lane with a source starts, [channels, height, width] each.

    `latents` are the encoded image's (None: the lane starts from noise and keeps nothing). Where `mask` (bool, one
    channel) is false, the image is kept; None: nowhere. `is_hidden`: the lane starts from noise all the same.
    `channels`: input of the denoiser behind the latents, at every step.
    """

    latents: torch.Tensor | None
    mask: torch.Tensor | None = None
    is_hidden: bool = False
    channels: torch.Tensor | None = None

    def packed(self, pack: Callable[[torch.Tensor], torch.Tensor]) -> "SourceLatents":
        """Return them as `pack` lays out latents; `channels` are left as they are."""
        if self.latents is None:
            return self
        mask = None if self.mask is None else pack(self.mask.expand_as(self.latents))
        return replace(self, latents=pack(self.latents), mask=mask)


NO_SOURCE = SourceLatents(latents=None)


class SourceBlend:
    """A lane's initial latents, `start`, and the source that is blended into its latents where the mask keeps it."""

    def __init__(self, trajectory: LinearTrajectory, noise: torch.Tensor, source: SourceLatents) -> None:
        self._levels = trajectory.levels
        self._noise = noise
        self._source = source
        if source.latents is None or source.is_hidden:
            self.start = noise * trajectory.init_noise_sigma
        else:
            self.start = self._levels[0].applied(source.latents, noise)

    def extended(self, model_input: torch.Tensor) -> torch.Tensor:
        """Return the model's input with the constant channels appended."""
        channels = self._source.channels
        return model_input if channels is None else torch.cat((model_input, channels))

    def blended(self, latents: torch.Tensor, step_index: int) -> torch.Tensor:
        """Return `latents` before step `step_index`, replaced by the image at that noise level where it is kept."""
        kept, mask = self._source.latents, self._source.mask
        if kept is None or mask is None:
            return latents
        return torch.where(mask, latents, self._levels[step_index].applied(kept, self._noise))
