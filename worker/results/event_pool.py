"""The parked events of one kind that this worker holds, under one lock: which wait and which are being sent."""

import threading
import time
from collections import deque
from collections.abc import Callable

from clients.webhooks import WebhookAttempt
from worker.amqp.delivery import Delivery
from worker.results.pacing import Pacing, ParkedEvent

# How long a thread waits before it looks again.
SWEEP_SECONDS = 5.0


class EventPool:
    """Owner of the held events and of their pacing. Thread-safe.

    Methods that return events to ack hold no lock any more when the caller acks.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._pacing = Pacing()
        self._waiting: deque[ParkedEvent] = deque()
        self._sending: list[ParkedEvent] = []
        self._last_success_at = time.monotonic()
        self.unreadable: deque[tuple[Delivery, str]] = deque()
        self.is_closing = False

    def close(self) -> None:
        """Wake every thread that waits."""
        with self._changed:
            self.is_closing = True
            self._changed.notify_all()

    def add(self, parked: ParkedEvent) -> list[ParkedEvent]:
        """Add an event; return those it replaces: after a lost connection, copies whose delivery tags are invalid."""
        with self._changed:
            replaced = [known for known in self._waiting if known.event.task_id == parked.event.task_id]
            for known in replaced:
                self._waiting.remove(known)
            self._waiting.append(parked)
            self._changed.notify_all()
        return replaced

    def add_unreadable(self, delivery: Delivery, reason: str) -> None:
        """Add a delivery that is no event, to be dead-lettered."""
        with self._changed:
            self.unreadable.append((delivery, reason))
            self._changed.notify_all()

    def return_event(self, parked: ParkedEvent) -> bool:
        """Add an event that was taken out; False where a redelivery has replaced it."""
        with self._changed:
            if any(known.event.task_id == parked.event.task_id for known in self._waiting):
                return False
            self._waiting.append(parked)
            return True

    def held(self) -> list[ParkedEvent]:
        """Return all events, those being sent included."""
        with self._changed:
            return [*self._waiting, *(parked for parked in self._sending if parked not in self._waiting)]

    def take_next(self, last_success_at: float) -> ParkedEvent | None:
        """Take the event to send next, if one is due within `SWEEP_SECONDS`.

        `last_success_at`: when a job's own thread last delivered an event of this kind, which shows as well that the
        backend accepts them.
        """
        with self._changed:
            if last_success_at > self._last_success_at:
                self._record_success(last_success_at)
            first = self._next_due()
            if first is None and not self.is_closing:
                now = time.monotonic()
                # Once: an event added during the wait may be due earlier.
                self._changed.wait(
                    self._pacing.seconds_to_wait(self._waiting, self._sending, now, at_most=SWEEP_SECONDS)
                )
                first = self._next_due()
            if first is None or self.is_closing:
                return None
            first.sent_at = time.monotonic()
            self._waiting.remove(first)
            self._sending.append(first)
            return first

    def finish(self, parked: ParkedEvent) -> None:
        """Count the event as no longer being sent."""
        with self._changed:
            self._sending.remove(parked)
            self._changed.notify_all()

    def take_all(self, is_chosen: Callable[[ParkedEvent], bool]) -> deque[ParkedEvent]:
        """Take the waiting events that `is_chosen` selects, so that none is sent while it is being settled."""
        with self._changed:
            chosen = deque(parked for parked in self._waiting if is_chosen(parked))
            for parked in chosen:
                self._waiting.remove(parked)
        return chosen

    def wait_for_sweep(self, *, unless_unreadable: bool) -> None:
        """Wait `SWEEP_SECONDS`, until closing, or for an unreadable delivery where that ends the wait."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.is_closing or (unless_unreadable and bool(self.unreadable)), timeout=SWEEP_SECONDS
            )

    def record_success(self) -> None:
        """Note that the backend accepted an event: the others are due."""
        with self._changed:
            self._record_success(time.monotonic())

    def record_failure(self, parked: ParkedEvent, attempt: WebhookAttempt) -> None:
        """Note that the backend did not accept `parked`; where it answers again after an outage, the others are due."""
        now = time.monotonic()
        with self._changed:
            is_back = self._pacing.record_failure(parked, attempt, now, num_parked=len(self._waiting) + 1)
            parked.record_failure(attempt, now)
            if is_back:
                self._make_due(is_accepting=False)

    def _next_due(self) -> ParkedEvent | None:
        return self._pacing.choose_next(self._waiting, self._sending, time.monotonic())

    def _record_success(self, success_at: float) -> None:
        self._last_success_at = success_at
        self._pacing.record_success()
        self._make_due(is_accepting=True)

    def _make_due(self, *, is_accepting: bool) -> None:
        for parked in self._waiting:
            parked.make_due(is_accepting=is_accepting)
        self._changed.notify_all()
