"""When parked events may be sent: distinguishes a backend that is down from a single event that always fails.

A backend that is down fails every event; an event that fails by itself is no evidence on the others. So a queue pauses
only after `FAILURES_BEFORE_PAUSE` different events in a row failed, or where the backend is unreachable; every event
has a delay of its own. An event that failed between two accepted ones is proven to fail by itself: from then on it is
no evidence on the backend, comes after all others and has longer delays.
"""

import math
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from clients.webhooks import CONNECT_TIMEOUT_SECONDS, MAX_RETRY_AFTER_SECONDS, WebhookAttempt
from worker.amqp.delivery import Delivery
from worker.results.notifier import delay_after, jittered
from worker.results.terminal_event import TerminalEvent

# How many different events in a row fail before the queue pauses. A few may be at fault themselves: where half of the
# events are, fifteen runs of sixteen include one that is not.
FAILURES_BEFORE_PAUSE = 4
# Concurrent calls while the backend accepts events: each event that it does not answer occupies one for 20 seconds.
MAX_CONCURRENT_CALLS = 4
# While the backend's state is unknown there is one call at a time, and a second one once the first is unanswered for
# this long, since that event may be the cause. Longer than a connection attempt takes to fail.
SLOW_SECONDS = CONNECT_TIMEOUT_SECONDS + 1.0
# Delays of an event that fails by itself, by how often it did.
OWN_FAILURE_DELAYS_SECONDS = (5.0, 15.0, 30.0, 60.0, 120.0, 300.0)
# Statuses that the event does not cause: a rejected token, and a rate limit.
BACKEND_STATUSES = frozenset({401, 403, 429})


@dataclass(slots=True, eq=False)
class ParkedEvent:
    """An unacked event from the outbox.

    `rank` counts the attempts that may have failed by the event itself; `num_tries` are all of this worker's.
    `num_failures` are those since the backend last accepted an event, `num_own_failures` those between two that it
    accepted.
    """

    event: TerminalEvent
    delivery: Delivery
    attempt: int
    held_since: float = field(default_factory=time.monotonic)
    reason: str = ""
    _has_retry_after: bool = False
    num_tries: int = 0
    num_failures: int = 0
    num_own_failures: int = 0
    rank: int = field(init=False)
    due_at: float = field(init=False)
    sent_at: float = 0.0
    # Ties are broken at random, so that failing events that came first do not stay first.
    order: float = field(default_factory=random.random)

    def __post_init__(self) -> None:
        # The worker that parked it read the backend's Retry-After.
        self.due_at = time.monotonic() + min(self.delivery.due - time.time(), MAX_RETRY_AFTER_SECONDS)
        self.rank = self.attempt
        self.reason = self.reason or self.delivery.reason

    @property
    def age_seconds(self) -> float:
        """Seconds since it was first parked."""
        return time.time() - self.delivery.since

    def record_failure(self, attempt: WebhookAttempt, now: float) -> None:
        """Count a failed attempt and set when the next is due."""
        self.attempt += 1
        self.num_tries += 1
        self.num_failures += 1
        self.rank += not is_unavailable(attempt)
        self.reason = attempt.reason
        self._has_retry_after = attempt.retry_after_seconds is not None
        planned = delay_after(self.num_failures, attempt.retry_after_seconds)
        if self.num_own_failures:
            planned = max(planned, self._own_failure_delay)
        self.due_at = now + jittered(planned)

    def record_dead_letter_failure(self, now: float) -> None:
        """Count a failed dead-lettering as a failure of its own: the event must not delay others."""
        self.num_own_failures += 1
        self.due_at = now + jittered(self._own_failure_delay)

    @property
    def _own_failure_delay(self) -> float:
        return OWN_FAILURE_DELAYS_SECONDS[min(self.num_own_failures, len(OWN_FAILURE_DELAYS_SECONDS)) - 1]

    def make_due(self, *, is_accepting: bool) -> None:
        """Make the event due now, unless it fails by itself.

        A backend that answers again without accepting events does not end a Retry-After.
        """
        if not self.num_own_failures and (is_accepting or not self._has_retry_after):
            self.due_at, self.num_failures = 0.0, 0


class Pacing:
    """Decides when a queue may send its next event. Not thread-safe; `now` is `time.monotonic()`."""

    def __init__(self) -> None:
        self.next_call_at = 0.0
        self._num_pauses = 0
        self._is_accepting = False
        self._is_unavailable = False
        self._num_allowed = FAILURES_BEFORE_PAUSE
        self._failed: dict[str, ParkedEvent] = {}

    def choose_next(
        self, parked: Iterable[ParkedEvent], calls: Sequence[ParkedEvent], now: float
    ) -> ParkedEvent | None:
        """Return the event to send beside the `calls` in progress; None where none may be sent.

        Of those due, events that fail by themselves come last, and the one with the fewest attempts first.
        """
        if now < self._free_at(calls):
            return None
        due = (one for one in parked if one.due_at <= now)
        return min(due, key=lambda one: (one.num_own_failures, one.rank, one.order), default=None)

    def seconds_to_wait(
        self, parked: Iterable[ParkedEvent], calls: Sequence[ParkedEvent], now: float, *, at_most: float
    ) -> float:
        """Return how long until an event may be due; `at_most` where that depends on a call in progress."""
        due_at = max(self._free_at(calls), min((one.due_at for one in parked), default=math.inf))
        return min(due_at - now, at_most) if due_at > now else at_most

    def _free_at(self, calls: Sequence[ParkedEvent]) -> float:
        """Return the earliest time of another call."""
        if len(calls) >= MAX_CONCURRENT_CALLS:
            return math.inf
        if self._is_accepting or not calls:
            return self.next_call_at
        if len(self._failed) + len(calls) >= self._num_allowed:
            return math.inf
        return max(self.next_call_at, max(call.sent_at for call in calls) + SLOW_SECONDS)

    def record_success(self) -> None:
        """Count an accepted event: whatever failed since the one before failed by itself."""
        if self._is_accepting:
            for parked in self._failed.values():
                parked.num_own_failures += 1
        self._failed.clear()
        self.next_call_at, self._num_pauses = 0.0, 0
        self._is_accepting, self._is_unavailable = True, False

    def record_failure(self, parked: ParkedEvent, attempt: WebhookAttempt, now: float, *, num_parked: int) -> bool:
        """Count a failure of one of `num_parked` events; return whether the backend answers again after an outage."""
        if is_unavailable(attempt):
            self._is_unavailable = True
            self._pause(now)
            return False
        is_back, self._is_unavailable = self._is_unavailable, False
        if is_back:
            # Every event may be sent once, however many fail.
            self._num_allowed = max(FAILURES_BEFORE_PAUSE, num_parked)
        if not parked.num_own_failures or self._is_accepting:
            self._failed[parked.event.task_id] = parked
        if sum(not one.num_own_failures for one in self._failed.values()) >= self._num_allowed:
            self._pause(now)
        return is_back

    def _pause(self, now: float) -> None:
        """Make no calls for a while, longer after each pause in a row."""
        self._failed.clear()
        self._is_accepting, self._num_allowed = False, FAILURES_BEFORE_PAUSE
        if self.next_call_at <= now:
            self._num_pauses += 1
            self.next_call_at = now + jittered(delay_after(self._num_pauses, None))


def is_unavailable(attempt: WebhookAttempt) -> bool:
    """Return whether the failure means that no event would be accepted: no connection, a wrong token, a rate limit."""
    return (attempt.status is None and not attempt.is_ambiguous) or attempt.status in BACKEND_STATUSES
