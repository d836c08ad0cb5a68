"""The order in which torch tries its attention kernels."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

HOPPER = 9
# An older one reads beyond the end of sequences that are no multiple of 128 long (pytorch/pytorch#169849).
MIN_CUDNN_VERSION = 91501
# On Hopper torch's FlashAttention is the second version, made for Ampere. cuDNN's kernels were measured there to be 1.7
# to 2.3 times as fast, and slower on most other GPUs (huggingface/transformers#48163). Inputs that cuDNN does not
# support, such as 32-bit values and heads wider than 128, go to the next kernel.
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class Hardware(NamedTuple):
    """The major number of a GPU's compute capability, and the version of the cuDNN that torch runs with."""

    capability: int
    cudnn_version: int


def probe(device: torch.device) -> Hardware:
    """Return the hardware of a CUDA device, as torch reports it."""
    cudnn_version = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return Hardware(torch.cuda.get_device_capability(device)[0], cudnn_version or 0)


class AttentionOrder:
    """The order of attention kernels for one device: cuDNN first on Hopper, and torch's own elsewhere."""

    def __init__(self, device: torch.device, probe: Callable[[torch.device], Hardware] = probe) -> None:
        self.is_cudnn_first = False
        if device.type == "cuda":
            found = probe(device)
            self.is_cudnn_first = found.capability == HOPPER and found.cudnn_version >= MIN_CUDNN_VERSION

    def applied(self) -> AbstractContextManager[Any]:
        """Return a context in which the order applies, to the whole process: one thread at a time."""
        return sdpa_kernel(CUDNN_FIRST, set_priority=True) if self.is_cudnn_first else nullcontext()
