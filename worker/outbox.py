"""The outbox: parked events go on being told until the backend takes them or a day has passed."""

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from clients.webhooks import MAX_RETRY_AFTER_SECONDS, Verdict, WebhookKind
from config.logs import bind, log_event
from worker.broker import Consumer, Publisher, PublishFailed
from worker.delivery import Delivery
from worker.events import TerminalEvent
from worker.ledger import Ledger
from worker.notifying import Notifier, delay_after, is_hopeless, jittered
from worker.queues import QueueNames
from worker.renewing import Renewer

logger = logging.getLogger(__name__)

# Well under the broker's consumer timeout (30 minutes by default), after which it would close the channel.
MAX_HELD_SECONDS = 600.0
SWEEP_SECONDS = 5.0
CLOSE_SECONDS = 2.0
TERMINAL_KINDS = (WebhookKind.COMPLETE, WebhookKind.FAILED)


class Backlog(NamedTuple):
    """What is in hand and undelivered: how many events, and seconds since the oldest was parked (0 without one)."""

    num_events: int
    age_seconds: float


@dataclass(slots=True)
class _Parked:
    """An event in hand out of the outbox; the broker keeps it until it is settled."""

    event: TerminalEvent
    delivery: Delivery
    attempt: int
    held_since: float = field(default_factory=time.monotonic)
    due_at: float = field(init=False)

    def __post_init__(self) -> None:
        # Who parked it knows how long the backend wants to be left alone.
        self.due_at = time.monotonic() + min(self.delivery.due - time.time(), MAX_RETRY_AFTER_SECONDS)


class Outbox:
    """Goes on delivering parked events, a lane and a thread for each kind, until the backend takes them or a day ends.

    A lane tries its events in turn and waits longer after each failure in a row, whichever event failed: a backend
    that is down is asked once every half minute, and one success lets the whole lane through. An event the backend
    always chokes on costs the others no more than its turn.
    """

    def __init__(self, notifier: Notifier, ledger: Ledger, publisher: Publisher, names: QueueNames) -> None:
        self._lanes = {kind: _Lane(kind, notifier, ledger, publisher, names) for kind in TERMINAL_KINDS}
        self._renewer = Renewer(publisher, self._take)

    def start(self, consumer: Consumer) -> None:
        self._renewer.start(consumer)
        for lane in self._lanes.values():
            lane.start(consumer)

    def close(self) -> None:
        """End the threads; what is in hand stays with the broker."""
        self._renewer.close()
        for lane in self._lanes.values():
            lane.close()

    def backlog(self) -> Backlog:
        """The events in hand. The broker counts none of them as ready, so its queue depth does not show them."""
        since = [moment for lane in self._lanes.values() for moment in lane.parked_since()]
        return Backlog(len(since), max(0.0, time.time() - min(since)) if since else 0.0)

    def on_delivery(self, delivery: Delivery) -> None:
        """Take an event out of the outbox. Runs on the consuming thread."""
        if delivery.num_deliveries > 0:
            self._renewer.add(delivery)  # its copy comes next, with nothing counted
        else:
            self._take(delivery)

    def _take(self, delivery: Delivery) -> None:
        try:
            event = TerminalEvent.from_json(delivery.body)
        except ValueError as error:
            self._lanes[WebhookKind.FAILED].refuse(delivery, str(error))
            return
        self._lanes[event.kind].add(_Parked(event, delivery, delivery.attempt))


class _Lane:
    """The parked events of one kind and the thread that delivers them."""

    def __init__(
        self, kind: WebhookKind, notifier: Notifier, ledger: Ledger, publisher: Publisher, names: QueueNames
    ) -> None:
        self._notifier = notifier
        self._ledger = ledger
        self._publisher = publisher
        self._names = names
        self._changed = threading.Condition()
        self._parked: deque[_Parked] = deque()
        self._in_turn: _Parked | None = None
        self._unreadable: deque[tuple[Delivery, str]] = deque()
        self._num_failures = 0
        self._due_at = 0.0
        self._is_closing = False
        self._consumer: Consumer | None = None
        self._thread = threading.Thread(target=self._run, name=f"outbox-{kind.value}", daemon=True)

    def start(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._thread.start()

    def close(self) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)

    def add(self, parked: _Parked) -> None:
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

    def parked_since(self) -> list[float]:
        """When each event in hand was parked, the one being told among them."""
        with self._changed:
            held = list(self._parked)
            if self._in_turn is not None and self._in_turn not in held:
                held.append(self._in_turn)
        return [parked.delivery.since for parked in held]

    def refuse(self, delivery: Delivery, reason: str) -> None:
        with self._changed:
            self._unreadable.append((delivery, reason))
            self._changed.notify_all()

    def _run(self) -> None:
        while not self._is_closing:
            try:
                self._bury_unreadable()
                self._return_stale()
                self._try_next()
            except PublishFailed as error:
                log_event(logger, "outbox keeps its events", logging.WARNING, reason=str(error))
                self._wait_longer(None)
                self._pause()

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
                self._in_turn = None

    def _take(self) -> _Parked | None:
        """The next event if its turn comes within `SWEEP_SECONDS`."""
        with self._changed:
            if not self._has_work():
                self._changed.wait(self._seconds_to_wait())  # once: what comes meanwhile may be due earlier
            if self._is_closing or not self._is_due():
                return None
            first = self._first()
            self._parked.remove(first)
            self._in_turn = first
            return first

    def _is_due(self) -> bool:
        return bool(self._parked) and time.monotonic() >= self._turn_at()

    def _turn_at(self) -> float:
        """When the lane's next event may be told."""
        return max(self._due_at, self._first().due_at)

    def _first(self) -> _Parked:
        """The one that may be told next; of several the one that has waited longest."""
        return min(self._parked, key=lambda parked: parked.due_at)

    def _has_work(self) -> bool:
        return self._is_closing or bool(self._unreadable) or self._is_due()

    def _pause(self) -> None:
        """Wait for the lane's next turn: a broker that confirms nothing is not asked in a loop."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing, timeout=max(self._due_at - time.monotonic(), 0.0))

    def _seconds_to_wait(self) -> float:
        until_due = self._turn_at() - time.monotonic() if self._parked else SWEEP_SECONDS
        return min(max(until_due, 0.0), SWEEP_SECONDS)

    def _return_stale(self) -> None:
        """Put events held too long back at the tail of the outbox, so that others behind them get a turn."""
        with self._changed:
            stale = [parked for parked in self._parked if time.monotonic() - parked.held_since > MAX_HELD_SECONDS]
        for parked in stale:
            delivery = parked.delivery
            self._publisher.publish(
                self._names.outbox, delivery.body, attempt=parked.attempt, since=delivery.since, due=delivery.due
            )
            with self._changed:
                if parked in self._parked:  # else a redelivery took its place meanwhile
                    self._parked.remove(parked)
            self._ack(delivery)

    def _try(self, parked: _Parked) -> None:
        # After a lost connection another holder of this event may have been quicker.
        if self._ledger.is_delivered(parked.event):
            self._ack(parked.delivery)
            return
        attempt = self._notifier.attempt(parked.event)
        if attempt.verdict is Verdict.DELIVERED:
            self._let_all_through()
            self._ledger.mark_delivered(parked.event)
            log_event(logger, "webhook delivered late", kind=parked.event.kind.value, attempt=parked.attempt)
            self._ack(parked.delivery)
        elif is_hopeless(attempt, time.time() - parked.delivery.since):
            reason = f"the {parked.event.kind.value} webhook was not taken: {attempt.reason}"
            self._notifier.bury(parked.delivery.body, reason)
            self._ack(parked.delivery)
        else:
            self._wait_longer(attempt.retry_after_seconds)
            parked.attempt += 1
            self._keep(parked)

    def _let_all_through(self) -> None:
        with self._changed:
            self._num_failures, self._due_at = 0, 0.0
            for parked in self._parked:
                parked.due_at = 0.0

    def _wait_longer(self, retry_after_seconds: float | None) -> None:
        self._num_failures += 1
        self._due_at = time.monotonic() + jittered(delay_after(self._num_failures, retry_after_seconds))

    def _keep(self, parked: _Parked) -> None:
        with self._changed:
            is_replaced = any(known.event.task_id == parked.event.task_id for known in self._parked)
            if not is_replaced:
                self._parked.append(parked)
        if is_replaced:
            self._ack(parked.delivery)

    def _bury_unreadable(self) -> None:
        while self._unreadable:
            delivery, reason = self._unreadable[0]
            self._notifier.bury(delivery.body, reason)
            self._ack(delivery)
            self._unreadable.popleft()

    def _ack(self, delivery: Delivery) -> None:
        assert self._consumer is not None, "a lane settles only what its consumer gave it"  # noqa: S101
        self._consumer.ack(delivery)
