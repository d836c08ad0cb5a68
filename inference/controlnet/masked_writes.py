"""Writes through a boolean mask that do not synchronise with the device."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class MaskedWrites(TorchFunctionMode):
    """Context in which `values[mask] = row` selects element by element between `row` and the old values.

    torch itself finds the indices first, and the host waits for all launched work to get their number.
    `values` [n, width], `mask` [n], `row` [1, width]. Any other assignment is torch's own. It holds for the thread that
    enters it alone.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not torch.Tensor.__setitem__:
            return func(*args, **(kwargs or {}))
        values, mask, row = args
        if not (isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.ndim == 1):
            return func(*args, **(kwargs or {}))
        return values.copy_(torch.where(mask[:, None], row, values))
