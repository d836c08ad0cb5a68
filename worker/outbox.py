"""The outbox: parked events go on being told until the backend takes them or a day has passed."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from clients.storage_errors import StorageError
from clients.webhooks import Attempt, Verdict, WebhookKind
from config.logs import bind, log_event
from worker.broker import Consumer, Publisher, PublishFailed
from worker.delivery import Delivery
from worker.events import TerminalEvent
from worker.ledger import Ledger, RecordUnreadable
from worker.notifying import MAX_AGE_SECONDS, Notifier, jittered
from worker.pacing import MAX_CALLS, Pacing, Parked
from worker.queues import QueueNames
from worker.renewing import Renewer

logger = logging.getLogger(__name__)

# Events in hand at once, of both kinds together.
PREFETCH = 200
# Well under the broker's consumer timeout (30 minutes by default), after which it would close the channel.
MAX_HELD_SECONDS = 600.0
SWEEP_SECONDS = 5.0
CLOSE_SECONDS = 2.0
# Between two tries of having an end recorded.
STORE_PAUSE_SECONDS = 15.0
TERMINAL_KINDS = (WebhookKind.COMPLETE, WebhookKind.FAILED)


class Backlog(NamedTuple):
    """What is in hand and undelivered: how many events, and seconds since the oldest was parked (0 without one)."""

    num_events: int
    age_seconds: float


class Outbox:
    """Goes on delivering parked events, a lane for each kind, until the backend takes them or a day ends.

    A backend that is down is asked about once every half minute, and one success lets the whole lane through; an event
    that the backend always fails on goes behind the others (`worker.pacing`). Where as many events are in hand as the
    broker gives at once, one that failed goes to the tail of the queue, so that those behind it come in.
    """

    def __init__(self, notifier: Notifier, ledger: Ledger, publisher: Publisher, names: QueueNames) -> None:
        self._lanes = {
            kind: _Lane(kind, notifier, ledger, publisher, names, is_full=self._is_full) for kind in TERMINAL_KINDS
        }
        self._renewer = Renewer(publisher)

    def start(self, consumer: Consumer) -> None:
        self._renewer.start(consumer)
        for lane in self._lanes.values():
            lane.start(consumer)

    def close(self) -> None:
        """End the threads; what is in hand stays with the broker."""
        deadline = time.monotonic() + CLOSE_SECONDS
        self._renewer.close()
        for lane in self._lanes.values():
            lane.close()
        for lane in self._lanes.values():
            lane.join(deadline)

    def backlog(self) -> Backlog:
        """The events in hand. The broker counts none of them as ready, so its queue depth does not show them."""
        since = [parked.delivery.since for parked in self.in_hand()]
        return Backlog(len(since), max(0.0, time.time() - min(since)) if since else 0.0)

    def in_hand(self) -> list[Parked]:
        """The events in hand, those being told among them."""
        return [parked for lane in self._lanes.values() for parked in lane.in_hand()]

    def on_delivery(self, delivery: Delivery) -> None:
        """Take an event out of the outbox. Runs on the consuming thread."""
        if delivery.num_deliveries > 0:
            self._renewer.add(delivery)  # its copy comes next, with nothing counted
            return
        try:
            event = TerminalEvent.from_json(delivery.body)
        except ValueError as error:
            self._lanes[WebhookKind.FAILED].refuse(delivery, str(error))
            return
        self._lanes[event.kind].add(Parked(event, delivery, delivery.attempt))

    def _is_full(self) -> bool:
        """Whether the broker gives no more before some event is settled."""
        return sum(len(lane.in_hand()) for lane in self._lanes.values()) >= PREFETCH


class _Lane:
    """The parked events of one kind, the threads that deliver them, and one that sees to those not to be delivered."""

    def __init__(
        self,
        kind: WebhookKind,
        notifier: Notifier,
        ledger: Ledger,
        publisher: Publisher,
        names: QueueNames,
        *,
        is_full: Callable[[], bool],
    ) -> None:
        self._kind = kind
        self._notifier = notifier
        self._ledger = ledger
        self._publisher = publisher
        self._names = names
        self._is_full = is_full
        self._changed = threading.Condition()
        self._pacing = Pacing()
        self._parked: deque[Parked] = deque()
        self._in_turn: list[Parked] = []
        self._unreadable: deque[tuple[Delivery, str]] = deque()
        self._heard_at = time.monotonic()
        self._is_closing = False
        self._consumer: Consumer | None = None
        targets = [self._tidy, *[self._send] * MAX_CALLS]
        self._threads = [threading.Thread(target=one, name=f"outbox-{kind.value}", daemon=True) for one in targets]

    def start(self, consumer: Consumer) -> None:
        self._consumer = consumer
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()

    def join(self, deadline: float) -> None:
        """Wait for the threads until `deadline`, by `time.monotonic()`."""
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))

    def add(self, parked: Parked) -> None:
        with self._changed:
            # A redelivery after a lost connection replaces the copy whose tag died with it.
            replaced = [known for known in self._parked if known.event.task_id == parked.event.task_id]
            for known in replaced:
                self._parked.remove(known)
            self._parked.append(parked)
            self._changed.notify_all()
        # Of the same session it was another copy of the event; a tag of a lost session is never sent.
        for known in replaced:
            self._ack(known.delivery)

    def in_hand(self) -> list[Parked]:
        with self._changed:
            return [*self._parked, *(parked for parked in self._in_turn if parked not in self._parked)]

    def refuse(self, delivery: Delivery, reason: str) -> None:
        with self._changed:
            self._unreadable.append((delivery, reason))
            self._changed.notify_all()

    def _tidy(self) -> None:
        """See to the events that no call is made for."""
        while not self._is_closing:
            try:
                self._bury_unreadable()
                self._bury_expired()
                self._return_stale()
                self._wait_for(lambda: self._is_closing or bool(self._unreadable))
            except PublishFailed as error:
                log_event(logger, "outbox keeps its events", logging.WARNING, reason=str(error))
                self._wait_for(lambda: self._is_closing)

    def _wait_for(self, is_so: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(is_so, timeout=SWEEP_SECONDS)

    def _send(self) -> None:
        while not self._is_closing:
            try:
                self._try_next()
            except PublishFailed as error:
                log_event(logger, "outbox keeps its events", logging.WARNING, reason=str(error))
                with self._changed:
                    self._pacing.hold(time.monotonic())

    def _try_next(self) -> None:
        parked = self._take()
        if parked is None:
            return
        with bind(task_id=parked.event.task_id, generation_id=parked.event.generation_id):
            try:
                self._try(parked)
            except PublishFailed:
                self._keep(parked)
                raise
            finally:
                with self._changed:
                    self._in_turn.remove(parked)
                    self._changed.notify_all()

    def _take(self) -> Parked | None:
        """The next event if its turn comes within `SWEEP_SECONDS`."""
        with self._changed:
            self._hear_of_others()
            if not self._is_closing and self._next() is None:
                self._changed.wait(self._seconds_to_wait())  # once: what comes meanwhile may be due earlier
            first = None if self._is_closing else self._next()
            if first is not None:
                first.begun_at = time.monotonic()
                self._parked.remove(first)
                self._in_turn.append(first)
            return first

    def _next(self) -> Parked | None:
        return self._pacing.next_of(self._parked, self._in_turn, time.monotonic())

    def _seconds_to_wait(self) -> float:
        return self._pacing.seconds_to_wait(self._parked, self._in_turn, time.monotonic(), at_most=SWEEP_SECONDS)

    def _hear_of_others(self) -> None:
        """An end that a job's own thread delivered says as well that the backend takes events."""
        taken_at = self._notifier.taken_at(self._kind)
        if taken_at > self._heard_at:
            self._note_taken(taken_at)

    def _return_stale(self) -> None:
        """Put events held too long back at the tail of the outbox, so that others behind them get a turn."""
        with self._changed:
            stale = [parked for parked in self._parked if time.monotonic() - parked.held_since > MAX_HELD_SECONDS]
        for parked in stale:
            self._put_back(parked)

    def _put_back(self, parked: Parked) -> None:
        """Have the event come again behind all others. Raises `PublishFailed`."""
        delivery = parked.delivery
        self._publisher.publish(
            self._names.outbox,
            delivery.body,
            attempt=parked.attempt,
            reason=parked.reason,
            since=delivery.since,
            due=time.time() + max(0.0, parked.due_at - time.monotonic()),
        )
        self._forget(parked)

    def _forget(self, parked: Parked) -> None:
        """Settle an event in hand of which there is a confirmed copy elsewhere."""
        with self._changed:
            if parked in self._parked:  # else a redelivery took its place meanwhile
                self._parked.remove(parked)
        self._ack(parked.delivery)

    def _bury_expired(self) -> None:
        """Leave what was tried here in vain and is over a day old with the dead letters, however rare its turns are."""
        with self._changed:
            expired = [one for one in self._parked if one.num_tries and one.age_seconds > MAX_AGE_SECONDS]
        for parked in expired:
            self._bury(parked, _not_taken(parked, parked.reason))
            self._forget(parked)

    def _try(self, parked: Parked) -> None:
        if not parked.event.is_recorded and not self._record(parked):
            return
        # After a lost connection another holder of this event may have been quicker.
        if self._ledger.is_delivered(parked.event):
            self._ack(parked.delivery)
            return
        attempt = self._notifier.attempt(parked.event)
        if attempt.verdict is Verdict.DELIVERED:
            with self._changed:
                self._note_taken(time.monotonic())
            self._ledger.mark_delivered(parked.event)
            log_event(logger, "webhook delivered late", kind=parked.event.kind.value, attempt=parked.attempt)
            self._ack(parked.delivery)
        elif self._notifier.is_hopeless(attempt, parked.age_seconds):
            self._bury(parked, _not_taken(parked, attempt.reason))
            self._ack(parked.delivery)
        else:
            self._note_failure(parked, attempt)

    def _note_failure(self, parked: Parked, attempt: Attempt) -> None:
        now = time.monotonic()
        with self._changed:
            is_back = self._pacing.note_failed(parked, attempt, now, num_parked=len(self._parked) + 1)
            parked.fail(attempt, now)
            if is_back:
                self._let_through(is_taking=False)
        if self._is_full():
            self._put_back(parked)
        else:
            self._keep(parked)

    def _record(self, parked: Parked) -> bool:
        """Record an end that the store did not take before. False: it is not to be sent, or not yet."""
        try:
            recorded = self._ledger.record_late(parked.event)
        except RecordUnreadable as error:
            self._bury(parked, f"the end cannot be recorded: {error}")
            self._ack(parked.delivery)
            return False
        except StorageError as error:
            self._wait_for_store(parked, error)
            return False
        if recorded is None:
            log_event(logger, "end dropped", logging.WARNING, reason="the job has had another since")
            self._ack(parked.delivery)
            return False
        parked.event = recorded
        return True

    def _wait_for_store(self, parked: Parked, error: StorageError) -> None:
        if parked.age_seconds > MAX_AGE_SECONDS:
            self._bury(parked, f"the end could not be recorded for a day: {error}")
            self._ack(parked.delivery)
            return
        log_event(logger, "end not recorded yet", logging.WARNING, reason=str(error))
        # Its own wait, not the lane's: the backend may be well.
        parked.due_at = time.monotonic() + jittered(STORE_PAUSE_SECONDS)
        self._keep(parked)

    def _note_taken(self, heard_at: float) -> None:
        self._heard_at = heard_at
        self._pacing.note_taken()
        self._let_through(is_taking=True)

    def _let_through(self, *, is_taking: bool) -> None:
        for parked in self._parked:
            parked.let_through(is_taking=is_taking)
        self._changed.notify_all()

    def _keep(self, parked: Parked) -> None:
        with self._changed:
            is_replaced = any(known.event.task_id == parked.event.task_id for known in self._parked)
            if not is_replaced:
                self._parked.append(parked)
        if is_replaced:
            self._ack(parked.delivery)

    def _bury(self, parked: Parked, reason: str) -> None:
        self._notifier.bury(parked.delivery.body, reason)

    def _bury_unreadable(self) -> None:
        while self._unreadable:
            delivery, reason = self._unreadable[0]
            self._notifier.bury(delivery.body, reason)
            self._ack(delivery)
            self._unreadable.popleft()

    def _ack(self, delivery: Delivery) -> None:
        assert self._consumer is not None, "a lane settles only what its consumer gave it"  # noqa: S101
        self._consumer.ack(delivery)


def _not_taken(parked: Parked, reason: str) -> str:
    return f"the {parked.event.kind.value} webhook was not taken: {reason}"
