"""Decode finished latents into pictures without waiting for the device."""

from collections import deque
from typing import NamedTuple

import torch

from inference.device.decoded_image import DecodedImage
from inference.device.device import Device, Guarded
from inference.errors import RequestFailed
from inference.lane import ActiveRequest, Lane
from inference.models.base import Family
from inference.models.inputs import sampler_of
from inference.request import RawImage


class _InFlight(NamedTuple):
    lane: Lane
    image: DecodedImage


class Decoder:
    """Owner of the images in flight from the device, in the order of their launch. The engine's thread calls it."""

    def __init__(self, model: Family, device: Device) -> None:
        self._model = model
        self._device = device
        self._in_flight: deque[_InFlight] = deque()

    @property
    def is_busy(self) -> bool:
        return bool(self._in_flight)

    def begin(self, lane: Lane) -> Exception | None:
        """Launch the lane's decoding, in tiles where memory ends; return the error where it cannot be launched."""
        latents = sampler_of(lane).latents
        in_tiles = not self._device.may_fit(latents.numel())
        guarded = self._device.guard(lambda: self._model.decode(latents, in_tiles=in_tiles))
        if isinstance(guarded.error, torch.OutOfMemoryError) and not in_tiles:
            self._device.note_too_large(latents.numel())
            guarded = self._device.guard(lambda: self._model.decode(latents, in_tiles=True))
        if guarded.result is not None:
            self._in_flight.append(_InFlight(lane, guarded.result))
        return guarded.error

    def is_due(self, *, num_left: int) -> bool:
        """Return whether the oldest image has arrived or more than `num_left` are in flight."""
        return len(self._in_flight) > num_left or (self.is_busy and self._in_flight[0].image.has_arrived)

    def end_oldest(self) -> tuple[Lane, Guarded[RawImage]]:
        """Wait for the oldest image; return its lane, and the image or its error."""
        lane, image = self._in_flight.popleft()

        def wait() -> RawImage:
            pixels = image.wait()
            if pixels is None:
                raise RequestFailed("OUTPUT_INVALID", "the model drew a picture with values that are not numbers")
            self._model.check_image(pixels)
            return RawImage(image.width, image.height, pixels.tobytes(), lane.seed)

        return lane, self._device.guard(wait)

    def drop(self, active: ActiveRequest) -> None:
        """Drop the request's images in flight."""
        self._in_flight = deque(one for one in self._in_flight if one.lane.owner is not active)
