"""Recovered jobs: which returns to the broker were no crash, and which job is done without another beside it."""

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass

from worker.amqp.delivery import Delivery

# From so many crashes on a job may be what kills the workers. Fewer happen to every job that shared a worker with one.
SUSPECT_CRASHES = 3
MAX_REMEMBERED = 1000
POLL_SECONDS = 0.1


@dataclass(slots=True)
class _Seen:
    """A message here: the session of its last delivery, the crashes counted of it, and how many sessions that it was
    delivered in were lost."""

    session: int
    num_crashes: int
    num_returns: int = 0


class CrashCounter:
    """Tells how many workers were killed with a message from how often it was returned. Thread-safe.

    The broker counts a return by a lost connection and one by a killed worker alike, and so does another worker that
    gets it. But a message that was delivered here in a session that was lost may have been returned by its end: it was
    not settled, or its ack was lost with the connection. Copies of a message have one body, and none of them can have
    been returned more often by this worker than it lost sessions.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: OrderedDict[bytes, _Seen] = OrderedDict()

    def num_crashes(self, delivery: Delivery) -> int:
        """Note that the message was delivered; its recoveries without those that this worker may have caused."""
        with self._lock:
            seen = self._seen.setdefault(_key(delivery), _Seen(delivery.session, delivery.num_recoveries))
            if seen.session < delivery.session:
                seen.session, seen.num_returns = delivery.session, seen.num_returns + 1
            num_new = max(0, delivery.num_recoveries - seen.num_crashes)
            seen.num_crashes = delivery.num_recoveries - min(num_new, seen.num_returns)
            self._seen.move_to_end(_key(delivery))
            if len(self._seen) > MAX_REMEMBERED:
                self._seen.popitem(last=False)
            return seen.num_crashes


class SuspectIsolation:
    """Lets a suspect begin only while no other recovered message is in hand, and none beside it. Thread-safe.

    A worker that is killed returns every message it holds, so each of them is counted. Without this the jobs beside the
    one that kills would be given up with it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._in_hand: set[tuple[int, int, int]] = set()
        self._suspect: tuple[int, int, int] | None = None

    def enter(self, delivery: Delivery) -> bool:
        """Note the message as in hand. False where it must leave again: a suspect is at work, or waits to be alone."""
        with self._changed:
            self._in_hand.add(_tag(delivery))
            return self._suspect is None

    def isolate(self, delivery: Delivery, is_draining: threading.Event) -> bool:
        """True once nothing but this suspect is in hand, or the worker is stopping. False at another suspect's turn."""
        with self._changed:
            if self._suspect not in (None, _tag(delivery)):
                return False
            self._suspect = _tag(delivery)
            while self._in_hand - {_tag(delivery)} and not is_draining.is_set():
                self._changed.wait(POLL_SECONDS)
            return True

    def leave(self, delivery: Delivery) -> None:
        """Note the message as settled."""
        with self._changed:
            self._in_hand.discard(_tag(delivery))
            if self._suspect == _tag(delivery):
                self._suspect = None
            self._changed.notify_all()


def is_suspect(delivery: Delivery) -> bool:
    """Whether the job may be what kills the workers."""
    return delivery.num_recoveries >= SUSPECT_CRASHES


def _key(delivery: Delivery) -> bytes:
    return hashlib.sha256(delivery.body).digest()


def _tag(delivery: Delivery) -> tuple[int, int, int]:
    return (delivery.session, delivery.channel_number, delivery.tag)
