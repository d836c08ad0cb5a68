"""Settling: the ack or the release of a job's delivery, and the copies that must be confirmed before an ack."""

import threading
from collections.abc import Callable
from dataclasses import replace

import tenacity

from worker.amqp.consumer import Consumer
from worker.amqp.delivery import Delivery
from worker.amqp.publisher import Publisher, PublishFailed
from worker.amqp.topology import QueueNames
from worker.jobs.disposition import Disposition
from worker.jobs.recovery import SuspectIsolation
from worker.results.notifier import Notifier

MAX_DEAD_BODY_BYTES = 64 * 1024


class Settler:
    """Settles the deliveries of jobs, each exactly once. Thread-safe; its methods block until the broker confirms."""

    def __init__(
        self,
        publisher: Publisher,
        notifier: Notifier,
        names: QueueNames,
        isolation: SuspectIsolation,
        is_draining: threading.Event,
    ) -> None:
        self._publisher = publisher
        self._notifier = notifier
        self._names = names
        self._isolation = isolation
        self._is_draining = is_draining
        self._consumer: Consumer

    def start(self, consumer: Consumer) -> None:
        """Set the consumer that deliveries come from and are settled with."""
        self._consumer = consumer

    def holds(self, delivery: Delivery) -> bool:
        """Return whether the delivery can still be settled: its session is not lost."""
        return self._consumer.holds(delivery)

    def settle(self, delivery: Delivery, disposition: Disposition) -> None:
        """Ack the delivery, or requeue it where it is released."""
        self._isolation.leave(delivery)
        if disposition is Disposition.RELEASE:
            self._consumer.requeue(delivery)
        else:
            self._consumer.ack(delivery)

    def settle_uncounted(self, delivery: Delivery, disposition: Disposition) -> None:
        """Settle the delivery; a released one is replaced by a copy in `recover` instead of requeued.

        A quorum queue counts a requeue, and the job would be given up after so many deployments. A queue with a time to
        live or a full one of limited length drops what is requeued; and no worker sees the limits that policies set.
        """
        if disposition is Disposition.RELEASE:
            self.move(replace(delivery, is_leased=False), self._names.recover)
        else:
            self.settle(delivery, disposition)

    def move(self, delivery: Delivery, queue: str) -> None:
        """Replace the message by a confirmed copy in `queue`, whose delivery count begins at 0."""

        def publish() -> None:
            # The broker has requeued the messages of a lost session: a copy would be a second one.
            if self.holds(delivery):
                self._publisher.publish(
                    queue,
                    delivery.body,
                    attempt=delivery.attempt,
                    is_leased=delivery.is_leased,
                    num_crashes=delivery.num_recoveries,
                    origin=delivery.origin,
                )

        self._publish_then_ack(delivery, publish)

    def dead_letter(self, delivery: Delivery, reason: str) -> None:
        """Replace what is no job by a dead letter."""
        body = delivery.body[:MAX_DEAD_BODY_BYTES]
        self._publish_then_ack(
            delivery, lambda: self._notifier.dead_letter(body, f"not a job: {reason}", origin=delivery.origin)
        )

    def _publish_then_ack(self, delivery: Delivery, publish: Callable[[], None]) -> None:
        """Ack once a copy is confirmed; release the delivery where the worker stops before that."""
        try:
            self.publish_until_confirmed(publish)
        except PublishFailed:
            self.settle(delivery, Disposition.RELEASE)
        else:
            self.settle(delivery, Disposition.ACK)

    def publish_until_confirmed(self, publish: Callable[[], None]) -> None:
        """Call `publish` until the broker confirms it. Raises `PublishFailed` only once the worker is stopping.

        A stopping worker calls it twice: where the connection had died unseen, the second call opens another.
        """
        tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(PublishFailed),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=5),
            stop=tenacity.stop_all(tenacity.stop_after_attempt(2), tenacity.stop_when_event_set(self._is_draining)),
            sleep=tenacity.sleep_using_event(self._is_draining),
            reraise=True,
        )(publish)
