"""A decoder's output as an image in flight to host memory."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from inference.device.host_copy import HostCopy, copy_to_host


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """An image [height, width, 3] in flight from the device. `flagged`: its bytes, and one more that is 0 where the
    decoder's values are not all finite."""

    flagged: HostCopy
    height: int
    width: int

    @property
    def has_arrived(self) -> bool:
        return self.flagged.has_arrived

    def wait(self) -> NDArray[np.uint8] | None:
        """Return the pixels; None where the decoder's values are not all finite."""
        host = self.flagged.wait()
        return host[:-1].view(self.height, self.width, 3).numpy() if host[-1] else None


def image_of(values: torch.Tensor) -> DecodedImage:
    """Launch the conversion of a decoder's `values` [3, height, width] in [-1, 1], rounded as in diffusers."""
    pixels = ((values / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    # One copy for both: asking the device about the values alone would wait for it.
    is_finite = values.isfinite().all().to(torch.uint8)
    flagged = torch.cat((pixels.flatten(), is_finite[None]))
    return DecodedImage(copy_to_host(flagged), pixels.shape[0], pixels.shape[1])
