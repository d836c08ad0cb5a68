"""A request's control as its lanes use it: the picture it follows, and when."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from inference.request import Control, GenerationRequest

# Gradients below the first are no edge, above the second they are; between them, where they go on from one. The
# values of the ControlNets' own published examples, for gradients as OpenCV measures them.
LOW_THRESHOLD = 100
HIGH_THRESHOLD = 200


@dataclass(frozen=True, slots=True, eq=False)
class Guide:
    """`net`, on the device, is shown `picture`, which is what the family makes of the control's."""

    net: Any
    picture: torch.Tensor
    scale: float
    start: float
    end: float

    def is_active(self, step_index: int, num_steps: int) -> bool:
        """Does it guide this step of so many? By the rule of diffusers' `controlnet_keep`."""
        return step_index / num_steps >= self.start and (step_index + 1) / num_steps <= self.end


def picture_of(request: GenerationRequest, control: Control) -> torch.Tensor:
    """What the request's ControlNet is shown: [3, height, width], from 0 to 1."""
    pixels = np.frombuffer(control.rgb, np.uint8).reshape(request.height, request.width, 3)
    shown = find_edges(pixels) if control.finds_edges else pixels
    return torch.from_numpy(shown.transpose(2, 0, 1).astype(np.float32) / 255)


def find_edges(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """White lines on black, [height, width, 3], of a picture [height, width, 3]. Canny's algorithm (1986) by OpenCV."""
    import cv2  # noqa: PLC0415 - 60 MB that only jobs with edges need

    edges = cv2.Canny(rgb, LOW_THRESHOLD, HIGH_THRESHOLD)
    return np.repeat(np.asarray(edges, np.uint8)[:, :, None], 3, axis=2)
