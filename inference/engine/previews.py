"""Previews of requests being denoised: latents projected to small images, lossy, never at the expense of a step."""

from typing import NamedTuple

import torch

from inference.device.device import Device
from inference.device.host_copy import HostCopy, copy_to_host
from inference.lane import ActiveRequest, Lane
from inference.latents.preview_projection import Projection
from inference.models.base import Family
from inference.models.inputs import sampler_of
from inference.request import Preview


class _Projected(NamedTuple):
    """An image [height, width, 3] in flight to host memory, of the request `owner`."""

    owner: ActiveRequest
    rgb: HostCopy


class Previews:
    """Owner of the previews in flight from the device. The engine's thread calls it."""

    def __init__(self, model: Family, device: Device, every: int) -> None:
        """Make a preview every so many steps; 0: none, at no cost."""
        self._model = model
        self._device = device
        self._every = every
        self._projection: Projection | None = None
        self._copies: list[_Projected] = []

    def project(self, lane: Lane, prediction: torch.Tensor) -> None:
        """Project the lane's image if a preview is due at the step that it is about to take by `prediction`."""
        if not self._every:
            return

        def begin_copy() -> None:
            # With the warm-up: before, the model's VAE may not be on the device.
            self._projection = self._projection or self._model.find_projection()
            if self._is_due(lane):
                rgb = self._projection(self._model.predict_x0(lane, prediction))
                self._copies.append(_Projected(lane.owner, copy_to_host(rgb)))

        # A preview that does not fit the memory is left out; the request goes on.
        self._device.guard(begin_copy)

    def deliver(self) -> None:
        """Give the previews that have arrived to their requests, for the next reports. Never blocks."""
        waiting, self._copies = self._copies, []
        for copy in waiting:
            if copy.rgb.has_arrived:
                height, width, _ = copy.rgb.host.shape
                copy.owner.preview = Preview(width, height, copy.rgb.host.numpy().tobytes())
            else:
                self._copies.append(copy)

    def _is_due(self, lane: Lane) -> bool:
        """Return whether a preview is due: of the first image only, and not at the last step."""
        sampler = sampler_of(lane)
        if lane.number > 0 or sampler.step_index + 1 >= sampler.num_steps:
            return False
        # A scheduler may take several forwards to one step.
        num_steps = lane.owner.traits.num_steps
        before, after = (
            index * num_steps // sampler.num_steps for index in (sampler.step_index, sampler.step_index + 1)
        )
        return before // self._every < after // self._every
