"""The last hour minute by minute, for the status page: jobs, their times, waiting jobs. Bounded whatever the load."""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from worker.outcome import Outcome

MINUTES = 60
# The rate of now: one minute alone swings between nothing and a whole batch.
RATE_MINUTES = 5
# Percentiles are of the newest jobs of the hour: at 1000 and more an hour these are the last few minutes'.
MAX_JOBS = 1000


@dataclass(frozen=True, slots=True)
class HourSummary:
    """The last hour, or the time since the start where that is less.

    `jobs_per_minute` counts completed jobs of the last `RATE_MINUTES`. The percentiles are of completed jobs, None
    without any: `seconds` at work, `waited` from `created_at` to the delivery. The columns have a value for each
    minute, the last one of the current minute: jobs by outcome, the mean seconds of a completed job, and the most
    waiting jobs that were counted, None where nothing was.
    """

    jobs_per_minute: float
    seconds_p50: float | None
    seconds_p95: float | None
    waited_p50: float | None
    waited_p95: float | None
    complete: tuple[int, ...]
    failed: tuple[int, ...]
    seconds: tuple[float | None, ...]
    waiting: tuple[int | None, ...]


@dataclass(slots=True)
class _Minute:
    number: int
    num_complete: int = 0
    num_failed: int = 0
    seconds: float = 0.0
    num_waiting: int | None = None


class _Completed(NamedTuple):
    minute: int
    seconds: float
    waited_seconds: float | None


class LastHour:
    """Counts in `MINUTES` buckets, and the times of the newest `MAX_JOBS` completed jobs. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._minutes: deque[_Minute] = deque([_Minute(self._number())], maxlen=MINUTES)
        self._completed: deque[_Completed] = deque(maxlen=MAX_JOBS)

    def add_job(self, outcome: Outcome, seconds: float, waited_seconds: float | None) -> None:
        """Count a job that has just ended, if it completed or failed."""
        with self._lock:
            minute = self._current()
            if outcome is Outcome.COMPLETE:
                minute.num_complete += 1
                minute.seconds += seconds
                self._completed.append(_Completed(minute.number, seconds, waited_seconds))
            elif outcome is Outcome.FAILED:
                minute.num_failed += 1

    def note_waiting(self, num_waiting: int) -> None:
        """Note how many jobs wait in the queue."""
        with self._lock:
            minute = self._current()
            minute.num_waiting = max(num_waiting, minute.num_waiting or 0)

    def summary(self) -> HourSummary:
        """Return the last hour as of now."""
        with self._lock:
            current = self._current()
            minutes = tuple(self._minutes)
            recent = [one for one in self._completed if one.minute > current.number - MINUTES]
            into_minute = self._clock() / 60 - current.number
        counted = minutes[-RATE_MINUTES:]
        times = sorted(one.seconds for one in recent)
        waits = sorted(one.waited_seconds for one in recent if one.waited_seconds is not None)
        return HourSummary(
            jobs_per_minute=round(
                sum(one.num_complete for one in counted) / max(1.0, len(counted) - 1 + into_minute), 2
            ),
            seconds_p50=percentile(times, 50),
            seconds_p95=percentile(times, 95),
            waited_p50=percentile(waits, 50),
            waited_p95=percentile(waits, 95),
            complete=tuple(one.num_complete for one in minutes),
            failed=tuple(one.num_failed for one in minutes),
            seconds=tuple(round(one.seconds / one.num_complete, 3) if one.num_complete else None for one in minutes),
            waiting=tuple(one.num_waiting for one in minutes),
        )

    def _number(self) -> int:
        return int(self._clock() // 60)

    def _current(self) -> _Minute:
        """Return the bucket of the current minute, behind those of the minutes without any event."""
        last, now = self._minutes[-1].number, self._number()
        self._minutes.extend(_Minute(number) for number in range(max(last, now - MINUTES) + 1, now + 1))
        return self._minutes[-1]


def percentile(ascending: Sequence[float], percent: int) -> float | None:
    """Return the nearest-rank percentile, None where there is no value. Pure."""
    return round(ascending[math.ceil(len(ascending) * percent / 100) - 1], 3) if ascending else None
