"""Copies from host memory to the device that do not wait for the work queued there."""

from collections.abc import Callable
from typing import Any

import torch

# Brings numbers to the device, as 32-bit floats, without waiting for it.
Upload = Callable[[Any], torch.Tensor]


def pinned(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `host` in memory that `device` reads while the host goes on: page-locked memory for a GPU."""
    return host.pin_memory() if device.type == "cuda" else host


def upload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy `host` to `device`, in the order of the current stream. From pageable memory the host would wait for it."""
    return pinned(host, device).to(device, non_blocking=True)
