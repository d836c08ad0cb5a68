"""Conditional cutoff: after some seconds a callback decides whether a thread's calls may use their whole deadlines."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from clients.timer_thread import TIMEOUTS

# A blocked `acquire` cannot be interrupted, so a thread that waits for a lock polls its cutoff.
LOCK_POLL_SECONDS = 0.2


class Cutoff:
    """Calls `may_go_on` once, on the thread of all timeouts. See `cutoff`."""

    def __init__(self, seconds: float, may_go_on: Callable[[], bool]) -> None:
        self.is_over = False
        self._may_go_on = may_go_on
        self._lock = threading.Lock()
        self._is_closed = False
        self._expire: Callable[[], None] | None = None
        self._timeout = TIMEOUTS.call_after(seconds, self._check)

    def follow(self, expire: Callable[[], None]) -> None:
        """Call `expire`, which ends the thread's current call, at the cutoff, or now where that is over."""
        with self._lock:
            self._expire = expire
            if self.is_over:
                expire()

    def close(self) -> None:
        """Cancel the timeout; after the return `may_go_on` is not called any more."""
        TIMEOUTS.cancel(self._timeout)
        with self._lock:
            self._is_closed = True

    def _check(self) -> None:
        with self._lock:
            if self._is_closed or self._may_go_on():
                return
            self.is_over = True
            if self._expire is not None:
                self._expire()


class _Current(threading.local):
    cutoff: Cutoff | None = None


_current = _Current()


@contextmanager
def cutoff(seconds: float, may_go_on: Callable[[], bool]) -> Iterator[Cutoff]:
    """Call `may_go_on` on another thread if the block still runs after `seconds`. Where it returns False, every
    `deadline` of this thread inside the block expires at once. Blocks do not nest."""
    made = Cutoff(seconds, may_go_on)
    _current.cutoff = made
    try:
        yield made
    finally:
        _current.cutoff = None
        made.close()


def current_cutoff() -> Cutoff | None:
    return _current.cutoff


def is_cut_off() -> bool:
    """Return whether this thread's cutoff is over, which then is the cause of its call's failure."""
    return _current.cutoff is not None and _current.cutoff.is_over


def acquire(lock: threading.Lock) -> bool:
    """Acquire `lock`; return False where the thread's cutoff comes first."""
    while not lock.acquire(timeout=LOCK_POLL_SECONDS):
        if is_cut_off():
            return False
    return True
