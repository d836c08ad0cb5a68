"""Bring tensors from the device to host memory behind the work that makes them, without waiting for it."""

from dataclasses import dataclass
from typing import Protocol

import torch


class Arrival(Protocol):
    """What is asked of a CUDA event."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


@dataclass(frozen=True, slots=True)
class HostCopy:
    """A tensor on its way to host memory. `arrival` is None where it is there already."""

    host: torch.Tensor
    arrival: Arrival | None = None

    @property
    def has_arrived(self) -> bool:
        return self.arrival is None or self.arrival.query()

    def wait(self) -> torch.Tensor:
        """The tensor in host memory. Raises what the device ended with, if it did."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.host


def copy_to_host(tensor: torch.Tensor) -> HostCopy:
    """Begin to copy the tensor; on a CPU there is nothing to copy."""
    if tensor.device.type == "cpu":
        return HostCopy(tensor)
    # Into pinned memory: any other copy would wait for the device. Where the tensor is dropped before the copy is done,
    # torch does not reuse the memory until then.
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrival.record()
    return HostCopy(host, arrival)
