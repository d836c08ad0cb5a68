"""The device: what fits its memory, how far the host may run ahead of it, and its state after an error."""

import gc
import logging
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, NamedTuple, TypeVar

import torch

from inference.errors import EngineError

logger = logging.getLogger(__name__)

# The rest is for fragmentation, other processes and the next adapter.
USABLE_SHARE = 0.9
UNLIMITED = 1 << 30

T = TypeVar("T")


class DeviceBroken(Exception):
    """The device fails every call (a sticky CUDA error): this process cannot use it any more."""


class Guarded(NamedTuple, Generic[T]):
    """The result of guarded work, or its error."""

    result: T | None
    error: Exception | None


class _Measured(NamedTuple):
    num_rows: int
    bytes_per_row: float


class _Counters(NamedTuple):
    """The allocator's counters, in bytes."""

    allocated: int
    peak: int
    reserved: int


class Mark:
    """A point in the device's queue of work, timed by the device's clock where it has one. Made by `Device.mark`."""

    def __init__(self, event: "torch.cuda.Event | None" = None) -> None:
        self._event = event
        self._at = time.monotonic()

    @property
    def is_past(self) -> bool:
        """True when all work launched before it is done."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Block until all work launched before it is done."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: "Mark") -> float:
        """Return the seconds from `earlier` to this mark. Both are past."""
        if self._event is None or earlier._event is None:
            return self._at - earlier._at
        return float(earlier._event.elapsed_time(self._event)) / 1000


class Device:
    """Owner of the measurements of the device's memory. On a CPU everything fits: the kernel swaps."""

    def __init__(self, device: torch.device, reserved_bytes: Callable[[], int] = lambda: 0) -> None:
        """`reserved_bytes()`: free memory that is reserved for other things than forwards."""
        self._device = device
        self._reserved_bytes = reserved_bytes
        self._is_cuda = device.type == "cuda"
        self._measured: dict[Hashable, _Measured] = {}
        self._too_large: dict[int, int] = {}  # sizes that did not fit, and the bytes free at that time
        self._last_step: Mark | None = None

    def max_rows(self, shape: Hashable) -> int:
        """Return how many rows of `shape` fit the memory free now, at least one; `UNLIMITED` before a measurement."""
        measured = self._measured.get(shape)
        if measured is None:
            return UNLIMITED
        return max(1, int(USABLE_SHARE * (self._free_bytes() - self._reserved_bytes()) / measured.bytes_per_row))

    @contextmanager
    def measured(
        self, shape: Hashable, num_rows: int, is_measurable: Callable[[], bool] = lambda: True
    ) -> Iterator[None]:
        """Measure the peak memory of a forward of `num_rows`. Reads the allocator's counters: no synchronisation.

        `is_measurable()`, asked at the end: False where it did not allocate its activations.
        """
        known = self._measured.get(shape)
        # The more rows, the smaller the share of the memory that a forward takes whatever its rows.
        if not self._is_cuda or (known is not None and num_rows < known.num_rows):
            yield
            return
        torch.cuda.reset_peak_memory_stats(self._device)
        before = self._counters().allocated
        yield
        if not is_measurable():
            return
        after = self._counters()
        # What another thread loaded during the forward stays, and is not the forward's.
        taken = after.peak - max(before, after.allocated)
        self._measured[shape] = _Measured(num_rows, max(taken, 1) / num_rows)

    def may_fit(self, size: int) -> bool:
        """Return whether more memory is free than when work of this size, or less, ran out of it."""
        shortages = [free for tried, free in self._too_large.items() if tried <= size]
        return not shortages or self._free_bytes() > max(shortages)

    def note_too_large(self, size: int) -> None:
        """Record that work of this size ran out of memory. On a CPU other processes cause that, and it passes."""
        if self._is_cuda:
            self._too_large[size] = self._free_bytes()

    def mark(self) -> Mark:
        """Return a mark behind all work launched until now."""
        if not self._is_cuda:
            return Mark()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return Mark(event)

    def keep_pace(self, launched: Mark) -> None:
        """Wait for the step before the one `launched`: the host prepares a step while the device does another."""
        if self._last_step is not None:
            self._last_step.wait()
        self._last_step = launched

    def guard(self, work: Callable[[], T]) -> Guarded[T]:
        """Run `work` and return its result or its error; raise only `DeviceBroken`, if the error broke the device."""
        try:
            return Guarded(work(), None)
        except EngineError as error:
            return Guarded(None, error)
        except Exception as error:
            failure = error.with_traceback(None)
            if not isinstance(error, torch.OutOfMemoryError):
                logger.exception("the model failed")
        # Only here, outside the except block, is the traceback gone and with it the tensors it held.
        gc.collect()
        if self._is_cuda:
            torch.cuda.empty_cache()
        try:
            canary = torch.ones(8, 8, device=self._device)
            is_alive = float((canary @ canary).sum()) == 512.0
        except RuntimeError:
            is_alive = False
        if not is_alive:
            raise DeviceBroken(f"the device answers nothing since: {failure}") from failure
        return Guarded(None, failure)

    def _free_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self._device)
        counters = self._counters()
        return int(free) + counters.reserved - counters.allocated

    def _counters(self) -> _Counters:
        # In one call: `torch.cuda.memory_allocated` and its like flatten and sort all statistics for each number, which
        # took 0.1 ms, several times a step.
        statistics = torch.cuda.memory_stats_as_nested_dict(self._device)
        allocated, reserved = statistics["allocated_bytes"]["all"], statistics["reserved_bytes"]["all"]
        return _Counters(allocated["current"], allocated["peak"], reserved["current"])
