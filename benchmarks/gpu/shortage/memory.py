"""Limited memory: the device's own by a limit, or on a CPU a counter of the amounts that a model allocates."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# What took memory: its kind first, then what it depends on.
Taken = tuple[str | int | bool, ...]


class DeviceMemory:
    """Owner of the limit of this process's memory on a CUDA device. `peaks`: bytes by what took them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peaks: dict[Taken, int] = {}

    @property
    def num_allocated(self) -> int | None:
        """Return the bytes in use, or None where they are not counted."""
        torch.cuda.synchronize(self._device)
        return torch.cuda.memory_allocated(self._device)

    def take(self, amount: int) -> None:
        """Do nothing: the device itself refuses what does not fit. `amount` is the measure of `CountedMemory`."""

    @contextmanager
    def noting(self, what: Taken, amount: int) -> Iterator[None]:
        """Record the block's peak memory, on the engine's thread."""
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        try:
            yield
        finally:
            taken = torch.cuda.max_memory_allocated(self._device) - before
            self.peaks[what] = max(taken, self.peaks.get(what, 0))

    @contextmanager
    def limited(self, num_bytes: float) -> Iterator[None]:
        """Leave `num_bytes` beside what is in use now."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        _, total = torch.cuda.mem_get_info(self._device)
        share = (torch.cuda.memory_reserved(self._device) + num_bytes) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), self._device)
        try:
            yield
        finally:
            self.lift_limit()

    def lift_limit(self) -> None:
        """Give back all of the device. Any thread may call it."""
        torch.cuda.set_per_process_memory_fraction(1.0, self._device)


class CountedMemory:
    """Counter of allocated amounts: beyond the limit it raises what CUDA's allocator raises."""

    num_allocated = None

    def __init__(self) -> None:
        self._limit = float("inf")
        self.peaks: dict[Taken, int] = {}

    def take(self, amount: int) -> None:
        """Raise `torch.OutOfMemoryError` where less is left."""
        if amount > self._limit:
            raise torch.OutOfMemoryError(f"{amount} are asked for, {self._limit:.0f} are there (a stand-in)")

    @contextmanager
    def noting(self, what: Taken, amount: int) -> Iterator[None]:
        """Take `amount`, and note it."""
        self.take(amount)
        self.peaks[what] = max(amount, self.peaks.get(what, 0))
        yield

    @contextmanager
    def limited(self, num_bytes: float) -> Iterator[None]:
        """Leave so much."""
        self._limit = num_bytes
        try:
            yield
        finally:
            self.lift_limit()

    def lift_limit(self) -> None:
        """Leave anything."""
        self._limit = float("inf")


Memory = DeviceMemory | CountedMemory


def memory_of(device: torch.device) -> Memory:
    """Return the device's memory, or on a CPU the counter."""
    return DeviceMemory(device) if device.type == "cuda" else CountedMemory()
