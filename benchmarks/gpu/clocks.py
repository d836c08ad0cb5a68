"""How long work takes on the device and on the host."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.stage import Context

CLOCK_UP_SECONDS = 1.0
# A rehearsal makes do with one.
LEAST_REPEATS = 3
# Calls of more seconds are timed less often: a step of ten lanes of Z-Image takes more than one.
LONG_SECONDS, LONG_REPEATS = 0.4, 2


class Times(NamedTuple):
    """Return medians in milliseconds of single calls, the device idle before each.

    `device_ms`: between two events around the call, waits for the host included. `host_ms`: until the call returned.
    `steady_ms`: one of several calls one behind the other, the host ahead of the device where it can be.
    """

    device_ms: float
    host_ms: float
    steady_ms: float
    repeats: int


def raise_clocks(context: Context) -> None:
    """Keep the device busy for a second: an idle GPU runs at a fraction of its clock, and takes time to get up."""
    if not context.is_cuda:
        return
    side = torch.randn(4096, 4096, device=context.device, dtype=torch.bfloat16)
    started_at = time.monotonic()
    while time.monotonic() - started_at < CLOCK_UP_SECONDS:
        for _ in range(20):
            torch.mm(side, side)
        context.synchronize()


def time_calls(
    context: Context, work: Callable[[], Any], *, warm_ups: int = 2, repeats: int = 7, seconds: float = 1.5
) -> Times:
    """Time `work` up to `repeats` times, and at least `LEAST_REPEATS` times, within about `seconds`; long ones less."""
    least = 1 if context.is_tiny else LEAST_REPEATS
    if context.is_tiny:
        warm_ups, repeats = 1, 1
    began_at = time.monotonic()
    work()
    context.synchronize()
    if time.monotonic() - began_at > LONG_SECONDS:
        warm_ups, least = 1, min(least, LONG_REPEATS)
    for _ in range(warm_ups - 1):
        work()
    context.synchronize()
    singles: list[tuple[float, float]] = []
    started_at = time.monotonic()
    while len(singles) < least or (len(singles) < repeats and time.monotonic() - started_at < seconds):
        singles.append(_time_one(context, work))
    median = statistics.median(device for device, _ in singles)
    num_steady = max(least, min(repeats, int(seconds * 1000 / max(median, 0.001))))
    started_at = time.perf_counter()
    for _ in range(num_steady):
        work()
    context.synchronize()
    steady = (time.perf_counter() - started_at) * 1000 / num_steady
    device, host = (statistics.median(one[i] for one in singles) for i in (0, 1))
    return Times(device, host, steady, len(singles))


def _time_one(context: Context, work: Callable[[], Any]) -> tuple[float, float]:
    context.synchronize()
    if not context.is_cuda:
        started_at = time.perf_counter()
        work()
        elapsed = (time.perf_counter() - started_at) * 1000
        return elapsed, elapsed
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    before.record()
    started_at = time.perf_counter()
    work()
    host = (time.perf_counter() - started_at) * 1000
    after.record()
    after.synchronize()
    return before.elapsed_time(after), host
