"""A mean of the newest values, weighted by time."""

import math
import time
from collections.abc import Callable

# Weighted by number, fifty values look back one second on a fast device and ten minutes on a slow one.
LATELY_SECONDS = 10.0


class RecentMean:
    """An exponentially weighted mean with the time constant `LATELY_SECONDS`. One thread adds values; any may read."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._added_at: float | None = None
        self.value = 0.0

    def add(self, value: float) -> None:
        """Average `value` in; after a pause of several time constants it is the mean."""
        now = self._clock()
        kept = 0.0 if self._added_at is None else math.exp((self._added_at - now) / LATELY_SECONDS)
        self.value = value + kept * (self.value - value)
        self._added_at = now

    @property
    def age_seconds(self) -> float:
        """Seconds since the newest value; infinite before the first."""
        return math.inf if self._added_at is None else self._clock() - self._added_at
