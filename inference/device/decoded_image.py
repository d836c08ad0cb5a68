"""The decoder's values as an image, on its way to host memory."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from inference.device.host_copy import HostCopy, copy_to_host


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """An image [height, width, 3] on its way from the device. `flagged`: its bytes, and one that is 0 where the decoder
    gave values that are not numbers."""

    flagged: HostCopy
    height: int
    width: int

    @property
    def has_arrived(self) -> bool:
        return self.flagged.has_arrived

    def wait(self) -> NDArray[np.uint8] | None:
        """The pixels; None where they came out as no numbers."""
        host = self.flagged.wait()
        return host[:-1].view(self.height, self.width, 3).numpy() if host[-1] else None


def image_of(values: torch.Tensor) -> DecodedImage:
    """The image that a decoder's `values` [3, height, width] between -1 and 1 stand for, rounded as diffusers does."""
    pixels = ((values / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    # One copy for both: asking the device about the values alone would wait for it.
    is_finite = values.isfinite().all().to(torch.uint8)
    flagged = torch.cat((pixels.flatten(), is_finite[None]))
    return DecodedImage(copy_to_host(flagged), pixels.shape[0], pixels.shape[1])
