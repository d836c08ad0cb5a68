"""Copies from the device to host memory, queued behind the work that computes the tensor, without blocking."""

from dataclasses import dataclass
from typing import Protocol

import torch


class Arrival(Protocol):
    """The part of `torch.cuda.Event` that is used."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


@dataclass(frozen=True, slots=True)
class HostCopy:
    """A tensor in flight to host memory. `arrival` is None where it was there already."""

    host: torch.Tensor
    arrival: Arrival | None = None

    @property
    def has_arrived(self) -> bool:
        return self.arrival is None or self.arrival.query()

    def wait(self) -> torch.Tensor:
        """Block until the copy is done and return the tensor in host memory. Raises the device's error, if any."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.host


def copy_to_host(tensor: torch.Tensor) -> HostCopy:
    """Launch a copy of the tensor; on a CPU there is nothing to copy."""
    if tensor.device.type == "cpu":
        return HostCopy(tensor)
    # Into pinned memory: a copy into pageable memory would block. Where the tensor is dropped before the copy is done,
    # torch does not reuse its memory until then.
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrival.record()
    return HostCopy(host, arrival)
