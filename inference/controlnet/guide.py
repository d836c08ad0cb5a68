"""Guidance of a lane by a ControlNet: its control image, and the steps at which it is active."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from inference.request import Control, GenerationRequest

# Canny's hysteresis: gradients between them are edges where they continue one above the second. The values of the
# ControlNets' own published examples, for gradients as OpenCV measures them.
LOW_THRESHOLD = 100
HIGH_THRESHOLD = 200


@dataclass(frozen=True, slots=True, eq=False)
class Guide:
    """A ControlNet on the device, `net`, and `image`, the control image as the family encodes it."""

    net: Any
    image: torch.Tensor
    scale: float
    start: float
    end: float

    def is_active(self, step_index: int, num_steps: int) -> bool:
        """Return whether it guides this step, by the rule of diffusers' `controlnet_keep`."""
        return step_index / num_steps >= self.start and (step_index + 1) / num_steps <= self.end


def group_rows(guides: Mapping[int, Guide], key: Callable[[int, Guide], Hashable]) -> list[list[int]]:
    """Group the rows, by number, that share a ControlNet's forward: those of one `key`."""
    groups: dict[Hashable, list[int]] = {}
    for number, guide in guides.items():
        groups.setdefault(key(number, guide), []).append(number)
    return list(groups.values())


def image_of(request: GenerationRequest, control: Control) -> torch.Tensor:
    """Return the control image, its edges where the request asks for them, [3, height, width] from 0 to 1."""
    pixels = np.frombuffer(control.rgb, np.uint8).reshape(request.height, request.width, 3)
    shown = find_edges(pixels) if control.finds_edges else pixels
    return torch.from_numpy(shown.transpose(2, 0, 1).astype(np.float32) / 255)


def find_edges(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the edges of an image, white on black, both [height, width, 3]. Canny's algorithm (1986) by OpenCV."""
    import cv2  # noqa: PLC0415 - 60 MB that only jobs with edges need

    edges = cv2.Canny(rgb, LOW_THRESHOLD, HIGH_THRESHOLD)
    return np.repeat(np.asarray(edges, np.uint8)[:, :, None], 3, axis=2)
