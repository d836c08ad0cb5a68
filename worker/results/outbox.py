"""The outbox: send parked events until the backend accepts them or a day has passed."""

import time
from typing import NamedTuple

from clients.webhooks import WebhookKind
from worker.amqp.consumer import Consumer
from worker.amqp.delivery import Delivery
from worker.amqp.publisher import Publisher
from worker.amqp.topology import QueueNames
from worker.results.kind_queue import KindQueue
from worker.results.ledger import Ledger
from worker.results.notifier import Notifier
from worker.results.pacing import ParkedEvent
from worker.results.republisher import Republisher
from worker.results.terminal_event import TerminalEvent

# Unacked events of this worker, of both kinds together.
PREFETCH = 200
CLOSE_SECONDS = 2.0
TERMINAL_KINDS = (WebhookKind.COMPLETE, WebhookKind.FAILED)


class Backlog(NamedTuple):
    """The number of undelivered events held, and seconds since the oldest was parked (0 without one)."""

    num_events: int
    age_seconds: float


class Outbox:
    """Sends parked events, one queue for each kind, until the backend accepts them or a day has passed.

    A backend that is down gets about one call every half minute, and one success makes the whole queue due; an event
    that always fails comes after the others (`pacing.py`). Where the prefetch is exhausted, a failed event goes to the
    tail of the broker's queue, so that those behind it are delivered.
    """

    def __init__(self, notifier: Notifier, ledger: Ledger, publisher: Publisher, names: QueueNames) -> None:
        self._queues = {
            kind: KindQueue(kind, notifier, ledger, publisher, names, is_full=lambda: len(self.held()) >= PREFETCH)
            for kind in TERMINAL_KINDS
        }
        self._republisher = Republisher(publisher, self._accept)

    def start(self, consumer: Consumer) -> None:
        """Start the threads; `consumer` is the one whose deliveries come in."""
        self._republisher.start(consumer)
        for queue in self._queues.values():
            queue.start(consumer)

    def close(self) -> None:
        """End the threads; unacked events stay with the broker."""
        deadline = time.monotonic() + CLOSE_SECONDS
        self._republisher.close()
        for queue in self._queues.values():
            queue.close()
        for queue in self._queues.values():
            queue.join(deadline)

    def backlog(self) -> Backlog:
        """Return the size of what is held. The broker counts it as unacked, so its queue depth does not show it."""
        since = [parked.delivery.since for parked in self.held()]
        return Backlog(len(since), max(0.0, time.time() - min(since)) if since else 0.0)

    def held(self) -> list[ParkedEvent]:
        """Return the events held, those being sent included."""
        return [parked for queue in self._queues.values() for parked in queue.held()]

    def on_delivery(self, delivery: Delivery) -> None:
        """Accept an event from the outbox queue. Runs on the consuming thread."""
        if delivery.num_deliveries > 0:
            self._republisher.add(delivery)  # its copy is delivered next, with a delivery count of 0
        else:
            self._accept(delivery)

    def _accept(self, delivery: Delivery) -> None:
        try:
            event = TerminalEvent.from_json(delivery.body)
        except ValueError as error:
            self._queues[WebhookKind.FAILED].add_unreadable(delivery, str(error))
            return
        self._queues[event.kind].add(ParkedEvent(event, delivery, delivery.attempt))
