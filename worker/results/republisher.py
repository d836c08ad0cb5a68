"""Republish parked events that were redelivered: RabbitMQ counts returns, and drops a message at its limit."""

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
# The publisher's connection is often lost together with the consumer's: the first attempt then fails.
NUM_TRIES = 3


class Republisher:
    """Owner of a thread that replaces redelivered messages by confirmed copies, whose delivery count begins at 0.

    A thread of its own, since a webhook takes up to 20 s: in that time an unstable connection could return a message
    more often than any limit allows. Where the broker confirms no copies, `accept` gets the deliveries as they are.
    """

    def __init__(self, publisher: Publisher, accept: Callable[[Delivery], None]) -> None:
        self._publisher = publisher
        self._accept = accept
        self._consumer: Consumer
        self._changed = threading.Condition()
        self._returned: deque[Delivery] = deque()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="renewer", daemon=True)

    def start(self, consumer: Consumer) -> None:
        """Start the thread; `consumer` is the one whose deliveries are added."""
        self._consumer = consumer
        self._thread.start()

    def close(self) -> None:
        """End the thread; unacked deliveries stay with the broker."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)

    def add(self, delivery: Delivery) -> None:
        """Have the delivery replaced by a copy."""
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
            if self._is_republished(delivery):
                continue
            # An event must not wait for a broker in alarm: all that are not republished are passed on.
            with self._changed:
                deliveries = [delivery, *self._returned]
                self._returned.clear()
            log_event(logger, "returned events not renewed", logging.WARNING, num_events=len(deliveries))
            for one in deliveries:
                self._accept(one)

    def _is_republished(self, delivery: Delivery) -> bool:
        backoff = Backoff()
        for _ in range(NUM_TRIES):
            try:
                # A delivery of a lost session is not copied: the broker has requeued the message itself.
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
            except PublishFailed as error:
                log_event(logger, "returned event not renewed yet", logging.DEBUG, reason=str(error))
                backoff.sleep(lambda: self._is_closing)
            else:
                log_event(logger, "returned event renewed", logging.DEBUG)
                return True
        return False
