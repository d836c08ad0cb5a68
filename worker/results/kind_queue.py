"""The outbox's events of one kind: threads that send them, and one that dead-letters or requeues the others."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from clients.storage.errors import StorageError
from clients.webhooks import WebhookKind, WebhookResult
from config.logs import bind, log_event
from worker.amqp.consumer import Consumer
from worker.amqp.delivery import Delivery
from worker.amqp.publisher import Publisher, PublishFailed
from worker.amqp.topology import QueueNames
from worker.results.event_pool import EventPool
from worker.results.ledger import Ledger, RecordUnreadable
from worker.results.notifier import MAX_AGE_SECONDS, Notifier, jittered
from worker.results.pacing import MAX_CONCURRENT_CALLS, ParkedEvent

logger = logging.getLogger(__name__)

# Well below the broker's consumer timeout (30 minutes by default), after which it would close the channel.
MAX_HELD_SECONDS = 600.0
# Between two attempts to record an event.
STORE_PAUSE_SECONDS = 15.0


class KindQueue:
    """Owner of the threads that send one kind's events, and of the thread that settles those not to be sent.

    `is_full`: whether the broker delivers no further events before one is settled.
    """

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
        self._pool = EventPool()
        self._consumer: Consumer
        targets = [self._sweep, *[self._send] * MAX_CONCURRENT_CALLS]
        self._threads = [threading.Thread(target=one, name=f"outbox-{kind.value}", daemon=True) for one in targets]

    def start(self, consumer: Consumer) -> None:
        """Start the threads; `consumer` is the one whose deliveries are added."""
        self._consumer = consumer
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Have the threads end."""
        self._pool.close()

    def join(self, deadline: float) -> None:
        """Wait for the threads until `deadline`, by `time.monotonic()`."""
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))

    def add(self, parked: ParkedEvent) -> None:
        """Add an event to be sent."""
        # A replaced copy of the same session is acked; a delivery tag of a lost session is never sent.
        for replaced in self._pool.add(parked):
            self._consumer.ack(replaced.delivery)

    def add_unreadable(self, delivery: Delivery, reason: str) -> None:
        """Add a delivery that is no event, to be dead-lettered."""
        self._pool.add_unreadable(delivery, reason)

    def held(self) -> list[ParkedEvent]:
        """Return all events held, those being sent included."""
        return self._pool.held()

    def _sweep(self) -> None:
        """Settle the events that are not to be sent, every few seconds."""
        while not self._pool.is_closing:
            is_done = True
            # Each by itself: a full dead-letter queue accepts none while the outbox accepts events.
            for work in (self._requeue_stale, self._drop_expired, self._drop_unreadable):
                try:
                    work()
                except PublishFailed as error:
                    _log_kept(error)
                    is_done = False
            self._pool.wait_for_sweep(unless_unreadable=is_done)

    def _requeue_stale(self) -> None:
        """Requeue events held too long at the outbox's tail, so that others get delivered."""
        stale = self._pool.take_all(lambda parked: time.monotonic() - parked.held_since > MAX_HELD_SECONDS)
        self._settle_all(stale, self._requeue_at_tail)

    def _drop_expired(self) -> None:
        """Dead-letter events that failed here and are over a day old, however rarely they are due."""
        expired = self._pool.take_all(lambda parked: parked.num_tries > 0 and parked.age_seconds > MAX_AGE_SECONDS)
        self._settle_all(expired, self._dead_letter_not_taken)

    def _drop_unreadable(self) -> None:
        unreadable = self._pool.unreadable
        while unreadable:
            delivery, reason = unreadable[0]
            self._notifier.dead_letter(delivery.body, reason)
            self._consumer.ack(delivery)
            unreadable.popleft()

    def _settle_all(self, chosen: deque[ParkedEvent], settle: Callable[[ParkedEvent], None]) -> None:
        """Settle each; where the broker confirms no copy, keep those that are left. Raises `PublishFailed`."""
        try:
            while chosen:
                settle(chosen[0])
                chosen.popleft()
        finally:
            for parked in chosen:
                self._keep(parked)

    def _send(self) -> None:
        while not self._pool.is_closing:
            parked = self._pool.take_next(self._notifier.accepted_at[self._kind])
            if parked is None:
                continue
            with bind(task_id=parked.event.task_id, generation_id=parked.event.generation_id):
                try:
                    self._send_or_settle(parked)
                except PublishFailed as error:
                    # The pause is this event's own: the others need no copy where the backend accepts them.
                    _log_kept(error)
                    self._keep(parked)
                finally:
                    self._pool.finish(parked)

    def _send_or_settle(self, parked: ParkedEvent) -> None:
        if not parked.event.is_recorded and not self._record(parked):
            return
        # After a lost connection another worker that holds this event may have delivered it first.
        if self._ledger.is_delivered(parked.event):
            self._consumer.ack(parked.delivery)
            return
        attempt = self._notifier.send_once(parked.event)
        if attempt.result is WebhookResult.DELIVERED:
            self._pool.record_success()
            self._ledger.mark_delivered(parked.event)
            log_event(logger, "webhook delivered late", kind=parked.event.kind.value, attempt=parked.attempt)
            self._consumer.ack(parked.delivery)
        elif self._notifier.is_permanent_failure(attempt, parked.age_seconds):
            parked.reason = attempt.reason
            self._dead_letter_not_taken(parked)
        else:
            self._pool.record_failure(parked, attempt)
            self._keep_or_requeue(parked)

    def _record(self, parked: ParkedEvent) -> bool:
        """Record an event that the store did not accept before; return whether it may be sent now."""
        try:
            recorded = self._ledger.record_late(parked.event)
        except RecordUnreadable as error:
            self._dead_letter(parked, f"the end cannot be recorded: {error}")
            return False
        except StorageError as error:
            if parked.age_seconds > MAX_AGE_SECONDS:
                self._dead_letter(parked, f"the end could not be recorded for a day: {error}")
                return False
            log_event(logger, "end not recorded yet", logging.WARNING, reason=str(error))
            # The pause is this event's own: the backend may be available.
            parked.due_at = time.monotonic() + jittered(STORE_PAUSE_SECONDS)
            self._keep_or_requeue(parked)
            return False
        if recorded is None:
            log_event(logger, "end dropped", logging.WARNING, reason="the job has had another end since")
            self._consumer.ack(parked.delivery)
            return False
        parked.event = recorded
        return True

    def _keep_or_requeue(self, parked: ParkedEvent) -> None:
        """Keep what failed, or requeue it where only that lets others be delivered. Raises `PublishFailed`."""
        if self._is_full():
            self._requeue_at_tail(parked)
        else:
            self._keep(parked)

    def _keep(self, parked: ParkedEvent) -> None:
        if not self._pool.return_event(parked):
            self._consumer.ack(parked.delivery)

    def _requeue_at_tail(self, parked: ParkedEvent) -> None:
        """Publish a copy that comes after all others, then ack. Raises `PublishFailed`."""
        copy = partial(
            self._publisher.publish,
            self._names.outbox,
            parked.delivery.body,
            attempt=parked.attempt,
            reason=parked.reason,
            since=parked.delivery.since,
            due=time.time() + max(0.0, parked.due_at - time.monotonic()),
        )
        self._copy_then_ack(parked, copy)

    def _dead_letter_not_taken(self, parked: ParkedEvent) -> None:
        self._dead_letter(parked, f"the {parked.event.kind.value} webhook was not taken: {parked.reason}")

    def _dead_letter(self, parked: ParkedEvent, reason: str) -> None:
        """Publish a confirmed copy to the dead letters, then ack. Raises `PublishFailed`."""
        try:
            self._copy_then_ack(parked, lambda: self._notifier.dead_letter(parked.delivery.body, reason))
        except PublishFailed:
            parked.record_dead_letter_failure(time.monotonic())
            raise

    def _copy_then_ack(self, parked: ParkedEvent, copy: Callable[[], None]) -> None:
        # A delivery of a lost session is not copied: the broker has requeued the message itself.
        if self._consumer.holds(parked.delivery):
            copy()
            self._consumer.ack(parked.delivery)


def _log_kept(error: PublishFailed) -> None:
    log_event(logger, "outbox keeps its events", logging.WARNING, reason=str(error))
