"""When parked events may be tried: tells a backend that is down from one event that it cannot take.

A backend that is down fails every event; an event that it always fails on says nothing of the others. So a lane waits
only where `TRIES_A_TURN` different events in a row were not taken, or where the backend cannot be reached at all, and
every event has a wait of its own. An event that failed between two that were taken is known to fail: from then on it
is no news of the backend, comes behind all others and waits longer.
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

# How many different events in a row are tried in vain before the lane waits. One may be at fault, and so may a few:
# where half of the events are, fifteen turns of sixteen come upon one that is not.
TRIES_A_TURN = 4
# Calls at once while the backend takes events: each event that it answers with silence holds one for 20 seconds.
MAX_CALLS = 4
# While nothing is known of the backend there is one call at a time, and another beside one that is not answered so
# long: it may be that event. Longer than it takes to see that there is no connection.
SLOW_SECONDS = CONNECT_TIMEOUT_SECONDS + 1.0
# Waits of an event that is known to fail, by how often it was seen to.
KNOWN_DELAYS_SECONDS = (5.0, 15.0, 30.0, 60.0, 120.0, 300.0)
# Of these the event is not the cause: a token that is not taken, and a limit on all calls.
BACKEND_STATUSES = frozenset({401, 403, 429})


@dataclass(slots=True, eq=False)
class Parked:
    """An event in hand out of the outbox; the broker keeps it until it is settled.

    `rank` counts the tries that may have failed by the event itself; `num_tries` are all of this worker's.
    `num_failures` are those since the backend last took an event, `num_known` those between two that it took.
    """

    event: TerminalEvent
    delivery: Delivery
    attempt: int
    held_since: float = field(default_factory=time.monotonic)
    reason: str = ""
    _is_asked_to_wait: bool = False
    num_tries: int = 0
    num_failures: int = 0
    num_known: int = 0
    rank: int = field(init=False)
    due_at: float = field(init=False)
    begun_at: float = 0.0
    # Among equals the order is random: no order of arrival has the bad ones first for ever.
    order: float = field(default_factory=random.random)

    def __post_init__(self) -> None:
        # Who parked it knows how long the backend wants to be left alone.
        self.due_at = time.monotonic() + min(self.delivery.due - time.time(), MAX_RETRY_AFTER_SECONDS)
        self.rank = self.attempt
        self.reason = self.reason or self.delivery.reason

    @property
    def age_seconds(self) -> float:
        """How long ago it was parked first."""
        return time.time() - self.delivery.since

    def fail(self, attempt: WebhookAttempt, now: float) -> None:
        """Note that `attempt` was in vain, and when the next is due."""
        self.attempt += 1
        self.num_tries += 1
        self.num_failures += 1
        self.rank += not is_away(attempt)
        self.reason = attempt.reason
        self._is_asked_to_wait = attempt.retry_after_seconds is not None
        planned = delay_after(self.num_failures, attempt.retry_after_seconds)
        if self.num_known:
            planned = max(planned, self._known_delay)
        self.due_at = now + jittered(planned)

    def note_unburied(self, now: float) -> None:
        """Note that the dead letters did not take it: it fails without doubt, and must hold up no other."""
        self.num_known += 1
        self.due_at = now + jittered(self._known_delay)

    @property
    def _known_delay(self) -> float:
        return KNOWN_DELAYS_SECONDS[min(self.num_known, len(KNOWN_DELAYS_SECONDS)) - 1]

    def let_through(self, *, is_taking: bool) -> None:
        """The backend takes events, or answers again: this one is due, unless it is known to fail.

        An answer that takes nothing does not end a pause that the backend asked for.
        """
        if not self.num_known and (is_taking or not self._is_asked_to_wait):
            self.due_at, self.num_failures = 0.0, 0


class Pacing:
    """Decides when a lane may try its next event. Not thread-safe; `now` is `time.monotonic()`."""

    def __init__(self) -> None:
        self.turn_at = 0.0
        self._num_waits = 0
        self._is_taking = False
        self._is_away = False
        self._num_allowed = TRIES_A_TURN
        self._failed: dict[str, Parked] = {}

    def next_of(self, parked: Iterable[Parked], calls: Sequence[Parked], now: float) -> Parked | None:
        """The event to try beside the `calls` under way; None where none may be tried.

        Of those due, known failures come last, and the one that was tried least before the others.
        """
        if now < self._free_at(calls):
            return None
        due = (one for one in parked if one.due_at <= now)
        return min(due, key=lambda one: (one.num_known, one.rank, one.order), default=None)

    def seconds_to_wait(
        self, parked: Iterable[Parked], calls: Sequence[Parked], now: float, *, at_most: float
    ) -> float:
        """How long until there may be a next one; where it is a call under way that is waited for, `at_most`."""
        due_at = max(self._free_at(calls), min((one.due_at for one in parked), default=math.inf))
        return min(due_at - now, at_most) if due_at > now else at_most

    def _free_at(self, calls: Sequence[Parked]) -> float:
        """When another call may begin."""
        if len(calls) >= MAX_CALLS:
            return math.inf
        if self._is_taking or not calls:
            return self.turn_at
        if len(self._failed) + len(calls) >= self._num_allowed:
            return math.inf
        return max(self.turn_at, max(call.begun_at for call in calls) + SLOW_SECONDS)

    def note_taken(self) -> None:
        """The backend took an event. Whatever failed since the one before, failed by itself."""
        if self._is_taking:
            for parked in self._failed.values():
                parked.num_known += 1
        self._failed.clear()
        self.turn_at, self._num_waits = 0.0, 0
        self._is_taking, self._is_away = True, False

    def note_failed(self, parked: Parked, attempt: WebhookAttempt, now: float, *, num_parked: int) -> bool:
        """The backend did not take `parked`, one of `num_parked` in hand. True where it answers again after all."""
        if is_away(attempt):
            self._is_away = True
            self.hold(now)
            return False
        is_back, self._is_away = self._is_away, False
        if is_back:
            # Every event may have one try, whatever becomes of the others.
            self._num_allowed = max(TRIES_A_TURN, num_parked)
        if not parked.num_known or self._is_taking:
            self._failed[parked.event.task_id] = parked
        if sum(not one.num_known for one in self._failed.values()) >= self._num_allowed:
            self.hold(now)
        return is_back

    def hold(self, now: float) -> None:
        """Wait for the next turn, longer after each wait in a row."""
        self._failed.clear()
        self._is_taking, self._num_allowed = False, TRIES_A_TURN
        if self.turn_at <= now:
            self._num_waits += 1
            self.turn_at = now + jittered(delay_after(self._num_waits, None))


def is_away(attempt: WebhookAttempt) -> bool:
    """Whether the failure says that no event would be taken: no connection, a wrong token, too many calls."""
    return (attempt.status is None and not attempt.is_ambiguous) or attempt.status in BACKEND_STATUSES
