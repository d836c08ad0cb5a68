"""Fresh copies of parked events that were returned: the broker counts returns, and drops a message at a limit."""

import logging
import threading
from collections import deque
from collections.abc import Callable

from config.logs import log_event
from worker.amqp.connection import Backoff
from worker.amqp.consumer import Consumer
from worker.amqp.delivery import Delivery
from worker.amqp.publisher import Publisher, PublishFailed

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 2.0
# Together with the consumer's connection the publisher's may be lost: the first try then fails.
NUM_TRIES = 3


class Renewer:
    """Owner of a thread that replaces returned messages by confirmed copies, whose count begins at 0.

    A thread of its own, since a call to the backend takes up to 20 s: meanwhile a breaking connection could return a
    message more often than any limit allows. Where the broker takes no copies, `take` gets the messages as they are.
    """

    def __init__(self, publisher: Publisher, take: Callable[[Delivery], None]) -> None:
        self._publisher = publisher
        self._take = take
        self._consumer: Consumer | None = None
        self._changed = threading.Condition()
        self._returned: deque[Delivery] = deque()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="renewer", daemon=True)

    def start(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._thread.start()

    def close(self) -> None:
        """End the thread; what is in hand stays with the broker."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)

    def add(self, delivery: Delivery) -> None:
        with self._changed:
            self._returned.append(delivery)
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closing or self._returned)
                if self._is_closing:
                    return
                delivery = self._returned.popleft()
            if not self._is_renewed(delivery):
                self._let_through(delivery)

    def _is_renewed(self, delivery: Delivery) -> bool:
        backoff = Backoff()
        for _ in range(NUM_TRIES):
            try:
                self._renew(delivery)
            except PublishFailed as error:
                log_event(logger, "returned event not renewed yet", logging.DEBUG, reason=str(error))
                backoff.sleep(lambda: self._is_closing)
            else:
                return True
        return False

    def _let_through(self, first: Delivery) -> None:
        """An end is told rather than kept waiting for a broker in alarm."""
        with self._changed:
            deliveries = [first, *self._returned]
            self._returned.clear()
        log_event(logger, "returned events not renewed", logging.WARNING, num_events=len(deliveries))
        for delivery in deliveries:
            self._take(delivery)

    def _renew(self, delivery: Delivery) -> None:
        assert self._consumer is not None, "deliveries come from a consumer"  # noqa: S101
        # Of a lost session: the broker has the message itself again.
        if self._consumer.holds(delivery):
            self._publisher.publish(
                delivery.queue,
                delivery.body,
                attempt=delivery.attempt,
                reason=delivery.reason,
                since=delivery.since,
                due=delivery.due,
            )
            self._consumer.ack(delivery)
