"""Waits between tries that workers do not make in step."""

import random
import time
from collections.abc import Callable

# A broker that is back has jobs waiting, and a try that is refused costs nobody anything.
MIN_SECONDS, MAX_SECONDS = 0.2, 1.0
POLL_SECONDS = 0.05


class Backoff:
    """Full jitter between tries, the ceiling doubling up to `MAX_SECONDS`."""

    def __init__(self) -> None:
        self._ceiling = MIN_SECONDS

    def reset(self) -> None:
        self._ceiling = MIN_SECONDS

    def sleep(self, is_over: Callable[[], bool], *, at_least_seconds: float = 0.0) -> None:
        """Wait before the next try, or until `is_over`."""
        seconds = random.uniform(MIN_SECONDS / 2, self._ceiling)  # noqa: S311 - jitter, not a secret
        self._ceiling = min(MAX_SECONDS, self._ceiling * 2)
        deadline = time.monotonic() + max(seconds, at_least_seconds)
        while time.monotonic() < deadline and not is_over():
            time.sleep(POLL_SECONDS)
