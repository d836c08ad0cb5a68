"""Writes through a boolean mask that do not ask the device where the mask is true."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class MaskedWrites(TorchFunctionMode):
    """Within it, `values[mask] = row` chooses between `row` and what is there, element by element.

    torch itself looks up the places first, and the host waits for all that was launched to learn how many there are.
    `values` [n, width], `mask` [n], `row` [1, width]. Any other assignment is torch's own. It holds for the thread that
    enters it and for no other.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not torch.Tensor.__setitem__ or not _is_mask(args[1]):
            return func(*args, **(kwargs or {}))
        values, mask, row = args
        return values.copy_(torch.where(mask[:, None], row, values))


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool and index.ndim == 1
