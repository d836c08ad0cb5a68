"""The memory of the bank's slabs, and an adapter's parts of them in one piece."""

from collections.abc import Sequence

import numpy as np
import torch

from inference.lora.layers import Slab


def zeros(num_pages: int, width: int, *, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """[num_pages, width] of zeros; on a CPU they take memory only as they are written."""
    if device.type != "cpu":
        return torch.zeros(num_pages, width, device=device, dtype=dtype)
    try:
        # numpy leaves large zeros to the kernel. torch.zeros would write all of them.
        blank = np.zeros(num_pages * width * dtype.itemsize, np.uint8)
    except MemoryError as error:
        raise torch.OutOfMemoryError(str(error)) from error
    return torch.from_numpy(blank).view(dtype).view(num_pages, width)


def split(pages: torch.Tensor, slabs: Sequence[Slab], num_pages: int) -> dict[Slab, torch.Tensor]:
    """What lies in `pages` [elements] one slab's part behind the other, as [num_pages, width] each."""
    own = torch.split(pages, [num_pages * slab.width for slab in slabs])
    return {slab: part.view(num_pages, slab.width) for slab, part in zip(slabs, own, strict=True)}
