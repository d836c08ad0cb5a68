"""Browse a queue over AMQP, for an operator: messages are held unacked, and requeued unless acked."""

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pika.exceptions

from config.broker import BrokerSettings
from worker.amqp.connection import LOST, close_connection, connect
from worker.amqp.content_headers import Properties
from worker.amqp.delivery import COUNT_HEADER, whole_number
from worker.amqp.error_messages import NOT_FOUND, ErrorMessages, describe
from worker.amqp.publisher import PublishFailed

# Of a message that is requeued as it is: a policy may set any limit, and not every version shows all that it counts.
MAX_DELIVERIES = 1
RESOURCE_LOCKED = 405  # AMQP's reply code
RETRY_SECONDS = 0.2
BUSY_SECONDS = 2.0
# With the last two the broker would route a copy to further queues again.
NOT_COPIED = (COUNT_HEADER, "CC", "BCC")


class QueueBusy(Exception):
    """Another browser holds the queue's messages."""


@dataclass(frozen=True, slots=True)
class BrowsedMessage:
    """A message that a `QueueBrowser` holds. `published_at` is in epoch seconds, None where its publisher set none."""

    body: bytes
    headers: Mapping[str, Any]
    published_at: float | None
    tag: int
    properties: Properties


class QueueBrowser:
    """Owner of a connection that holds a queue's messages and requeues those not acked. Not thread-safe.

    A second browser would find the queue empty, so it gets `QueueBusy`. Every method raises `PublishFailed` where the
    broker does not answer.

    AMQP can only browse by delivering. Quorum queues count each delivery that is returned, also by a closed channel:
    RabbitMQ 4 drops a message returned more than 20 times unless the queue has a limit of its own, 3.x only by policy.
    So a message is requeued by reject, which every version counts in a header (nack is not counted by the latest), and
    once its count is high, as a confirmed copy whose count begins at 0. The order is lost: without a limit, 3.x returns
    messages to the tail, and many at once in any order.
    """

    def __init__(self, settings: BrokerSettings, queue_name: str) -> None:
        self._settings = settings
        self._queue = queue_name
        self._connection: Any = None  # pika has no type hints
        self._channel: Any = None
        self._held: dict[int, BrowsedMessage] = {}

    def __enter__(self) -> "QueueBrowser":
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                self._open()
            except QueueBusy:
                # The lock of the browser before outlives its connection briefly.
                if time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_SECONDS)
            else:
                return self

    def _open(self) -> None:
        try:
            self._connection = connect(self._settings, "darkroom dead")
            self._channel = self._connection.channel()
            self._channel.confirm_delivery()
            self._channel.queue_declare(f"{self._queue}.inspection", exclusive=True)  # gone with the connection
        except LOST as error:
            reason = ErrorMessages(self._settings).session_ended(error, is_connected=self._connection is not None)
            close_connection(self._connection)
            if isinstance(error, pika.exceptions.ChannelClosedByBroker) and error.reply_code == RESOURCE_LOCKED:
                raise QueueBusy(f"somebody else is at work on {self._queue}: try again in a moment") from error
            raise PublishFailed(reason) from error

    def __exit__(self, *_: object) -> None:
        with suppress(*LOST):  # what cannot be requeued is requeued when the connection closes
            for held in list(self._held.values()):
                if whole_number(held.headers.get(COUNT_HEADER), default=0) < MAX_DELIVERIES:
                    self._channel.basic_reject(held.tag, requeue=True)
                else:
                    properties = held.properties.for_copy(without=NOT_COPIED)
                    self._channel.basic_publish("", self._queue, held.body, properties, mandatory=True)
                    self._channel.basic_ack(held.tag)
        close_connection(self._connection)

    def fetch(self, max_messages: int) -> list[BrowsedMessage]:
        """Get up to `max_messages`; none where the queue does not exist yet."""
        has_retried = False
        try:
            while len(self._held) < max_messages:
                method, properties, body = self._channel.basic_get(self._queue)
                if method is None:
                    if self._held or has_retried:
                        break
                    # Messages that the browser before requeued may not be ready yet.
                    has_retried = True
                    time.sleep(RETRY_SECONDS)
                    continue
                tag = method.delivery_tag
                self._held[tag] = BrowsedMessage(body, properties.headers, properties.timestamp, tag, properties)
        except pika.exceptions.ChannelClosedByBroker as error:
            if error.reply_code != NOT_FOUND:
                raise PublishFailed(describe(error)) from error
        except LOST as error:
            raise PublishFailed(describe(error)) from error
        return list(self._held.values())

    def ack(self, held: BrowsedMessage) -> None:
        """Ack the message."""
        try:
            self._channel.basic_ack(held.tag)
        except LOST as error:
            raise PublishFailed(describe(error)) from error
        del self._held[held.tag]
