"""Timeouts that share one thread: `threading.Timer` would start one for each call over HTTP, a tenth of its CPU."""

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Timeout:
    """A call that is due at `due_at`, by `time.monotonic()`."""

    due_at: float
    call: Callable[[], object]


class TimerThread:
    """Owner of one daemon thread, which makes the calls that are due. Thread-safe; no call may block."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._timeouts: set[Timeout] = set()
        self._wakes_at = math.inf
        self._thread: threading.Thread | None = None

    def call_after(self, seconds: float, call: Callable[[], object]) -> Timeout:
        """Make `call` after so many seconds, unless it is cancelled before."""
        timeout = Timeout(time.monotonic() + seconds, call)
        with self._changed:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="timeouts", daemon=True)
                thread.start()
                self._thread = thread
            self._timeouts.add(timeout)
            # Most calls end long before they are due: those that are due later than the thread wakes need no wake-up.
            if timeout.due_at < self._wakes_at:
                self._changed.notify()
        return timeout

    def cancel(self, timeout: Timeout) -> None:
        """Drop the call; it may just be made."""
        with self._changed:
            self._timeouts.discard(timeout)

    def _run(self) -> None:
        while True:
            for timeout in self._take_due():
                try:
                    timeout.call()
                except Exception:  # the thread's boundary: all other calls depend on it
                    logger.exception("a timeout's call failed")

    def _take_due(self) -> list[Timeout]:
        """Remove and return what is due; blocks until the first may be."""
        with self._changed:
            self._wakes_at = min((timeout.due_at for timeout in self._timeouts), default=math.inf)
            seconds = self._wakes_at - time.monotonic()
            if seconds > 0:
                self._changed.wait(None if math.isinf(seconds) else min(seconds, threading.TIMEOUT_MAX))
            due = [timeout for timeout in self._timeouts if timeout.due_at <= time.monotonic()]
            self._timeouts.difference_update(due)
            return due


TIMEOUTS = TimerThread()
