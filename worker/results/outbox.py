"""The outbox: parked events go on being told until the backend takes them or a day has passed."""

import time
from typing import NamedTuple

from clients.webhooks import WebhookKind
from worker.amqp.consumer import Consumer
from worker.amqp.delivery import Delivery
from worker.amqp.publisher import Publisher
from worker.amqp.topology import QueueNames
from worker.results.ledger import Ledger
from worker.results.notifier import Notifier
from worker.results.outbox_lane import Lane
from worker.results.pacing import Parked
from worker.results.renewing import Renewer
from worker.results.terminal_event import TerminalEvent

# Events in hand at once, of both kinds together.
PREFETCH = 200
CLOSE_SECONDS = 2.0
TERMINAL_KINDS = (WebhookKind.COMPLETE, WebhookKind.FAILED)


class Backlog(NamedTuple):
    """What is in hand and undelivered: how many events, and seconds since the oldest was parked (0 without one)."""

    num_events: int
    age_seconds: float


class Outbox:
    """Goes on delivering parked events, a lane for each kind, until the backend takes them or a day ends.

    A backend that is down is asked about once every half minute, and one success lets the whole lane through; an event
    that the backend always fails on goes behind the others (`pacing.py`). Where as many events are in hand as the
    broker gives at once, one that failed goes to the tail of the queue, so that those behind it come in.
    """

    def __init__(self, notifier: Notifier, ledger: Ledger, publisher: Publisher, names: QueueNames) -> None:
        self._lanes = {
            kind: Lane(kind, notifier, ledger, publisher, names, is_full=self._is_full) for kind in TERMINAL_KINDS
        }
        self._renewer = Renewer(publisher, self._take)

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
        else:
            self._take(delivery)

    def _take(self, delivery: Delivery) -> None:
        try:
            event = TerminalEvent.from_json(delivery.body)
        except ValueError as error:
            self._lanes[WebhookKind.FAILED].refuse(delivery, str(error))
            return
        self._lanes[event.kind].add(Parked(event, delivery, delivery.attempt))

    def _is_full(self) -> bool:
        """Whether the broker gives no more before some event is settled."""
        return sum(len(lane.in_hand()) for lane in self._lanes.values()) >= PREFETCH
