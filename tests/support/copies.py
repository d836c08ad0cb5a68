"""Copies from the CPU to a device, recorded without a device."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# It has shapes and no values: who asks it for one, as no step may, gets an error.
NOWHERE = torch.device("meta")


class Copies(TorchDispatchMode):
    """Records the copies from the CPU to `NOWHERE` that the code within it makes. Not for use in inference mode."""

    def __init__(self) -> None:
        super().__init__()
        self.num_async = 0
        self.blocking: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        made = func(*args, **given)
        name = func.overloadpacket.__name__
        if name in {"_to_copy", "copy_"} and made.device == NOWHERE and args[name == "copy_"].is_cpu:
            if given.get("non_blocking") or args[2:] == (True,):
                self.num_async += 1
            else:
                self.blocking.append(f"{func} of {tuple(made.shape)}")
        return made
