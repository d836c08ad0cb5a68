"""Supply the noise that a diffusers scheduler draws inside its own step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class SuppliedNoise(TorchFunctionMode):
    """Context in which `torch.randn` with `generator` returns `supply(shape)`. Counts the calls.

    Few schedulers take their noise as an argument; all draw it with `torch.randn`. It holds for the thread that enters
    it alone.
    """

    def __init__(self, generator: torch.Generator, supply: Callable[[Sequence[int]], torch.Tensor]) -> None:
        super().__init__()
        self._generator = generator
        self._supply = supply
        self.num_supplied = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is not torch.randn or given.get("generator") is not self._generator:
            return func(*args, **given)
        self.num_supplied += 1
        return self._supply(args[0])
