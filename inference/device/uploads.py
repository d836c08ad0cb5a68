"""Copies from host memory to the device that do not block on the work queued there."""

from collections.abc import Callable
from typing import Any

import torch

# Copies numbers to the device, as 32-bit floats, without blocking.
Upload = Callable[[Any], torch.Tensor]


def pinned(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `host` in page-locked memory for a GPU, which it can read while the host goes on."""
    return host.pin_memory() if device.type == "cuda" else host


def upload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy `host` to `device`, in the order of the current stream. From pageable memory the copy would block."""
    return pinned(host, device).to(device, non_blocking=True)
