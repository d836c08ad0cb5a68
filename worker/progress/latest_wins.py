"""A thread that handles the newest items of many jobs: newer items of a job replace its pending ones."""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

CLOSE_SECONDS = 2.0
# The thread wakes at least this often. Where it did not for `FREEZE_SECONDS`, the process may have been frozen, or an
# item took that long.
PULSE_SECONDS, FREEZE_SECONDS = 0.25, 1.0

Item = TypeVar("Item")


class Source(Generic[Item]):
    """The pending items of one job, oldest first, and whether one is being handled."""

    def __init__(self) -> None:
        self.pending: deque[Item] = deque()
        self.is_handling = False
        self.is_closed = False


OneSource = TypeVar("OneSource", bound=Source[Any])


class LatestWins(Generic[OneSource, Item]):
    """Owner of a thread that calls `handle` for one item at a time, the sources in turn. Thread-safe.

    `handle` takes at most `handle_seconds`. `on_freeze` is called for each open source after the process may have been
    frozen, before the next item is handled.
    """

    def __init__(
        self,
        name: str,
        handle: Callable[[OneSource, Item], None],
        *,
        handle_seconds: float,
        on_freeze: Callable[[OneSource], None] | None = None,
    ) -> None:
        self._handle = handle
        self._handle_seconds = handle_seconds
        self._on_freeze = on_freeze
        self._seen_running_at = math.inf
        self._changed = threading.Condition()
        self._open: set[OneSource] = set()
        self._waiting: deque[OneSource] = deque()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Drop pending items and end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)

    def add(self, source: OneSource) -> None:
        """Count `source` as open until it is retired."""
        with self._changed:
            self._open.add(source)

    def offer(self, source: OneSource, items: Iterable[Item]) -> None:
        """Replace the source's pending items, unless it is closed. Returns at once."""
        with self._changed:
            if source.is_closed:
                return
            source.pending = deque(items)
            if source not in self._waiting:
                self._waiting.append(source)
            self._changed.notify_all()

    def retire(self, source: OneSource) -> None:
        """Close the source, drop its pending items and wait for the one being handled: none is handled afterwards."""
        with self._changed:
            source.is_closed = True
            self._open.discard(source)
            if source in self._waiting:
                self._waiting.remove(source)
            self._changed.wait_for(lambda: not source.is_handling, timeout=self._handle_seconds + 1)

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            source, item = taken
            self._handle(source, item)
            with self._changed:
                source.is_handling = False
                self._changed.notify_all()

    def _take(self) -> tuple[OneSource, Item] | None:
        """Take the next item; blocks until there is one. Returns None when closing."""
        with self._changed:
            self._notice_freeze()
            while not self._waiting and not self._is_closing:
                self._changed.wait(None if self._on_freeze is None else PULSE_SECONDS)
                self._notice_freeze()
            if self._is_closing:
                return None
            source = self._waiting.popleft()
            item = source.pending.popleft()
            if source.pending:
                self._waiting.append(source)
            source.is_handling = True
            return source, item

    def _notice_freeze(self) -> None:
        """Call `on_freeze` where the thread did not run for long: frozen in a wait, in an item or between them."""
        now = time.monotonic()
        if self._on_freeze is not None and now - self._seen_running_at > FREEZE_SECONDS:
            for source in self._open:
                self._on_freeze(source)
        self._seen_running_at = now
