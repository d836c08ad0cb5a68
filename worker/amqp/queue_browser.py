"""Looking through a queue over AMQP, for a person: messages are held for a moment, and go back unless settled."""

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
from worker.amqp.error_messages import ErrorMessages, describe
from worker.amqp.publisher import PublishFailed

MAX_LOOKS = 1  # a policy may set any limit, and not every version shows all that it counts

SECOND_LOOK_SECONDS = 0.2
BUSY_SECONDS = 2.0
# The last two would have the broker send a copy to other queues again.
NOT_COPIED = (COUNT_HEADER, "CC", "BCC")


class QueueBusy(Exception):
    """The queue is being inspected by somebody else."""


@dataclass(frozen=True, slots=True)
class BrowsedMessage:
    """A message of an `Inspection`. `published_at` is in epoch seconds, None where its publisher did not say."""

    body: bytes
    headers: Mapping[str, Any]
    published_at: float | None
    tag: int
    properties: Properties


class QueueBrowser:
    """Owner of a connection that holds a queue's messages; what is not acked by the end goes back. Not thread-safe.

    Whoever else looks meanwhile would find the queue empty, so a second inspection gets `QueueBusy`. Every method
    raises `PublishFailed` where the broker does not answer.

    A look is a delivery: AMQP has no other. Quorum queues count it, and so they do when a channel closes unsettled:
    RabbitMQ 4 drops a message returned more than 20 times unless told otherwise, 3.x only where a policy says so. So a
    message goes back by reject, which every version counts in a header (nack is not counted by the latest), and once
    its count is high as a confirmed copy, which begins at nought. The order is lost: without a limit, 3.x returns
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
                return self._open()
            except QueueBusy:
                # The lock of the inspection before outlives it by a moment.
                if time.monotonic() > deadline:
                    raise
                time.sleep(SECOND_LOOK_SECONDS)

    def _open(self) -> "QueueBrowser":
        try:
            self._connection = connect(self._settings, "darkroom dead")
            self._channel = self._connection.channel()
            self._channel.confirm_delivery()
            self._lock()
        except LOST as error:
            reason = ErrorMessages(self._settings).session_ended(error, is_connected=self._connection is not None)
            close_connection(self._connection)
            raise PublishFailed(reason) from error
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(*LOST):  # what cannot be given back goes back when the connection closes
            for held in list(self._held.values()):
                self._give_back(held)
        close_connection(self._connection)

    def take(self, max_messages: int) -> list[BrowsedMessage]:
        """Everything that is in the queue, or as much; nothing where the queue does not exist yet."""
        has_looked_twice = False
        try:
            while len(self._held) < max_messages:
                method, properties, body = self._channel.basic_get(self._queue)
                if method is None:
                    if self._held or has_looked_twice:
                        break
                    # What the inspection before gave back is on its way.
                    has_looked_twice = True
                    time.sleep(SECOND_LOOK_SECONDS)
                    continue
                tag = method.delivery_tag
                self._held[tag] = BrowsedMessage(body, properties.headers, properties.timestamp, tag, properties)
        except pika.exceptions.ChannelClosedByBroker as error:
            if error.reply_code != 404:
                raise PublishFailed(describe(error)) from error
        except LOST as error:
            raise PublishFailed(describe(error)) from error
        return list(self._held.values())

    def ack(self, held: BrowsedMessage) -> None:
        """Have the broker forget the message."""
        try:
            self._channel.basic_ack(held.tag)
        except LOST as error:
            raise PublishFailed(describe(error)) from error
        del self._held[held.tag]

    def _lock(self) -> None:
        try:
            self._channel.queue_declare(f"{self._queue}.inspection", exclusive=True)  # gone with the connection
        except pika.exceptions.ChannelClosedByBroker as error:
            if error.reply_code != 405:
                raise
            close_connection(self._connection)
            raise QueueBusy(f"somebody else is at work on {self._queue}: try again in a moment") from error

    def _give_back(self, held: BrowsedMessage) -> None:
        if whole_number(held.headers.get(COUNT_HEADER), default=0) < MAX_LOOKS:
            self._channel.basic_reject(held.tag, requeue=True)
            return
        properties = held.properties.for_copy(without=NOT_COPIED)
        self._channel.basic_publish("", self._queue, held.body, properties, mandatory=True)
        self._channel.basic_ack(held.tag)
