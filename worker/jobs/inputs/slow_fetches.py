"""Limit how many jobs wait for a slow fetch at once, so that one stalled object does not stop all others."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from clients.cutoff import cutoff
from clients.storage.errors import StorageUnavailable
from clients.storage.location import ObjectRef

# A fetch of usual size is over by then; a longer one needs one of the few slots for slow fetches.
SLOW_AFTER_SECONDS = 10.0


class SlowFetchRefused(StorageUnavailable):
    """The fetch was slow, and all slots for slow fetches were taken."""


class SlowFetchLimit:
    """Counts the jobs whose fetch is slow. Thread-safe; `num_slow` may be at once, at least one."""

    def __init__(self, num_slow: int = 1) -> None:
        self._num_slow = max(1, num_slow)
        self._lock = threading.Lock()
        self._slow: Counter[ObjectRef] = Counter()

    @contextmanager
    def waiting_for(self, ref: ObjectRef) -> Iterator[None]:
        """Limit the fetch of `ref` inside. Raises `SlowFetchRefused` where it is slow and every slot is taken: at
        once where it is slow for other jobs already."""
        reason = f"{ref}: does not come within {SLOW_AFTER_SECONDS:g} s, and other jobs need the place"
        with self._lock:
            if self._slow[ref] and self._slow.total() >= self._num_slow:
                raise SlowFetchRefused(reason)
        has_slow_place = False

        def may_go_on() -> bool:
            nonlocal has_slow_place
            with self._lock:
                has_slow_place = self._slow.total() < self._num_slow
                if has_slow_place:
                    self._slow[ref] += 1
            return has_slow_place

        try:
            with cutoff(SLOW_AFTER_SECONDS, may_go_on) as cut:
                try:
                    yield
                except StorageUnavailable as error:
                    if cut.is_over:
                        raise SlowFetchRefused(reason) from error
                    raise
        finally:
            if has_slow_place:
                with self._lock:
                    self._slow -= Counter([ref])  # an object that is slow for no job is dropped
