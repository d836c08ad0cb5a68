"""Recovered jobs: crash counts without this worker's own returns, and isolation of jobs that may kill workers."""

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass

from worker.amqp.delivery import Delivery

# From so many crashes on a job may be a poison job. Fewer happen to every job that shared a worker with one.
SUSPECT_CRASHES = 3
MAX_REMEMBERED = 1000
POLL_SECONDS = 0.1


@dataclass(slots=True)
class _Seen:
    """A message: the session of its last delivery, its counted crashes, and the lost sessions it was delivered in."""

    session: int
    num_crashes: int
    num_returns: int = 0


class CrashCounter:
    """Counts the workers killed with a message, from how often the broker returned it. Thread-safe.

    The broker counts a return by a lost connection and one by a killed worker alike, and so does another worker that
    gets it. But a message that was delivered here in a session that was lost may have been returned by its end: it was
    not settled, or its ack was lost with the connection. Copies of a message have one body, and none of them can have
    been returned more often by this worker than it lost sessions.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: OrderedDict[bytes, _Seen] = OrderedDict()

    def num_crashes(self, delivery: Delivery) -> int:
        """Record a delivery; return the message's recoveries without those that this worker may have caused."""
        key = hashlib.sha256(delivery.body).digest()
        with self._lock:
            seen = self._seen.setdefault(key, _Seen(delivery.session, delivery.num_recoveries))
            if seen.session < delivery.session:
                seen.session, seen.num_returns = delivery.session, seen.num_returns + 1
            num_new = max(0, delivery.num_recoveries - seen.num_crashes)
            seen.num_crashes = delivery.num_recoveries - min(num_new, seen.num_returns)
            self._seen.move_to_end(key)
            if len(self._seen) > MAX_REMEMBERED:
                self._seen.popitem(last=False)
            return seen.num_crashes


class SuspectIsolation:
    """Runs a suspect only while no other recovered message is held here. Thread-safe.

    A worker that is killed returns every message it holds, so each of them is counted. Without isolation the jobs
    beside a poison job would be dead-lettered with it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._in_hand: set[tuple[int, int, int]] = set()
        self._suspect: tuple[int, int, int] | None = None

    def enter(self, delivery: Delivery) -> bool:
        """Add the message; False where it must leave again, because a suspect runs or waits to run alone."""
        with self._changed:
            self._in_hand.add(_tag(delivery))
            return self._suspect is None

    def isolate(self, delivery: Delivery, is_draining: threading.Event) -> bool:
        """Wait until only this suspect is held or the worker stops; return False at another suspect's turn."""
        with self._changed:
            if self._suspect not in (None, _tag(delivery)):
                return False
            self._suspect = _tag(delivery)
            while self._in_hand - {_tag(delivery)} and not is_draining.is_set():
                self._changed.wait(POLL_SECONDS)
            return True

    def leave(self, delivery: Delivery) -> None:
        """Remove the settled message."""
        with self._changed:
            self._in_hand.discard(_tag(delivery))
            if self._suspect == _tag(delivery):
                self._suspect = None
            self._changed.notify_all()


def is_suspect(delivery: Delivery) -> bool:
    """Return whether the job may be a poison job."""
    return delivery.num_recoveries >= SUSPECT_CRASHES


def _tag(delivery: Delivery) -> tuple[int, int, int]:
    return (delivery.session, delivery.channel_number, delivery.tag)
