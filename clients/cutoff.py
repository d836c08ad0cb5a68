"""A second thought about a wait: the calls of one thread end before their deadlines unless it may go on."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# A lock cannot be given up from outside, so a thread that waits for one looks at its cutoff now and then.
LOCK_POLL_SECONDS = 0.2


class Cutoff:
    """Asks once, from a thread of its own, whether another thread may go on waiting. See `cutoff`."""

    def __init__(self, seconds: float, may_go_on: Callable[[], bool]) -> None:
        self.is_over = False
        self._may_go_on = may_go_on
        self._lock = threading.Lock()
        self._is_closed = False
        self._expire: Callable[[], None] | None = None
        self._asker = threading.Timer(seconds, self._ask)
        self._asker.daemon = True
        self._asker.start()

    def follow(self, expire: Callable[[], None]) -> None:
        """Call `expire`, which ends what the thread waits for now, when the cutoff comes."""
        with self._lock:
            self._expire = expire
            if self.is_over:
                expire()

    def close(self) -> None:
        """When this returns, `may_go_on` is not asked any more."""
        self._asker.cancel()
        with self._lock:
            self._is_closed = True

    def _ask(self) -> None:
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
    """Ask `may_go_on`, on another thread, if the block still runs after `seconds`. Where it says no, every `deadline`
    of this thread inside the block is over at once. Blocks do not nest."""
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
    """Whether this thread's cutoff has come: what it was doing failed for that, and for no other reason."""
    return _current.cutoff is not None and _current.cutoff.is_over


def acquire(lock: threading.Lock) -> bool:
    """Acquire `lock`; False where the thread's cutoff comes first."""
    while not lock.acquire(timeout=LOCK_POLL_SECONDS):
        if is_cut_off():
            return False
    return True
