"""A request's control as its lanes use it: the picture it follows, and when."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from inference.controlnet.edges import find_edges
from inference.request import Control, GenerationRequest


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
