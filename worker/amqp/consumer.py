"""The consuming connection: deliveries in, acks out, reconnecting until closed.

It never publishes: RabbitMQ blocks a connection that publishes during a memory or disk alarm, acks included.
`BlockingConnection` is not thread-safe: other threads reach it through `add_callback_threadsafe` only.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import pika.exceptions

from config.broker import BrokerSettings
from config.logs import log_event
from worker.amqp.connection import (
    CLOSE_SECONDS,
    POLL_SECONDS,
    REFUSED,
    REFUSED_BACKOFF_SECONDS,
    Backoff,
    Channel,
    Connection,
    close_connection,
    connect,
)
from worker.amqp.declared import inspect_declaration
from worker.amqp.delivery import Delivery, delivery_of
from worker.amqp.error_messages import ErrorMessages, QueueUnusable
from worker.amqp.intake import Intake
from worker.amqp.job_queues import JobQueues
from worker.amqp.subscriptions import Broadcast, Subscription, WeightedSubscription
from worker.amqp.topology import QueueNames, ensure_fanout, ensure_queues

logger = logging.getLogger(__name__)


class _SessionLost(Exception):
    """The broker cancelled a consumer or closed a channel while the connection stayed up."""


class Consumer:
    """Owner of the consuming connection and its thread. Reconnects until closed."""

    def __init__(
        self,
        settings: BrokerSettings,
        names: QueueNames,
        subscriptions: list[Subscription],
        broadcast: Broadcast,
        on_lost: Callable[[], None] = lambda: None,
        *,
        weighted: WeightedSubscription | None = None,
        not_before: float = 0.0,
    ) -> None:
        """Create a consumer that does not connect `not_before` a time of `time.monotonic()`.

        `on_lost` runs on the consuming thread when the connection is lost and the broker may redeliver to another
        worker what was delivered: it must return at once.
        """
        self._settings = settings
        self._error_messages = ErrorMessages(settings)
        self._names = names
        self._subscriptions = subscriptions
        self._broadcast = broadcast
        self._on_lost = on_lost
        self._job_queues = JobQueues(names, weighted, self._error_messages) if weighted else None
        self._intake: Intake | None = None
        self._not_before = not_before
        self._connection: Connection = None
        self._channels: dict[int, Channel] = {}
        self._tags: dict[Channel, str] = {}
        self._subscribed: dict[Channel, Subscription] = {}
        self._session = 0
        self._is_paused = False
        self._is_closing = False
        self._is_draining = False
        self._is_cancelled_by_broker = False
        self._thread = threading.Thread(target=self._run, name="consumer", daemon=True)
        self.is_connected = False

    def start(self) -> None:
        self._thread.start()

    def stop_consuming(self) -> None:
        """Cancel all consumers; unsettled deliveries stay ours, heartbeats and settling go on."""
        self._is_draining = True
        self._on_connection(self._cancel_consumers)

    def pause(self, *, is_paused: bool) -> None:
        """Cancel or resume the consumers of work; unsettled deliveries stay ours."""
        if is_paused != self._is_paused:
            self._is_paused = is_paused
            self._on_connection(self._apply_pause)

    def close(self) -> None:
        """Send pending acks and nacks, then close; the broker requeues unsettled deliveries."""
        self._is_closing = True
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)

    def ack(self, delivery: Delivery) -> None:
        """Ack the message. AMQP confirms no ack: a lost one shows as a redelivery."""
        self._on_connection(partial(self._settle, delivery, "basic_ack", {}))

    def holds(self, delivery: Delivery) -> bool:
        """Return whether the message is still ours to settle; a lost connection has it requeued."""
        return delivery.session == self._session and self.is_connected

    def requeue(self, delivery: Delivery) -> None:
        """Nack the message back into its queue. RabbitMQ up to 4.2 adds that to its delivery count."""
        self._on_connection(partial(self._settle, delivery, "basic_nack", {"requeue": True}))

    def _on_connection(self, action: Callable[[], None]) -> None:
        connection = self._connection
        if connection is not None:
            # Suppressed on a lost connection: what was to be settled will be redelivered.
            with suppress(pika.exceptions.ConnectionWrongStateError):
                connection.add_callback_threadsafe(action)

    def _settle(self, delivery: Delivery, verb: str, options: Mapping[str, Any]) -> None:
        # A delivery tag is valid on its own channel only: on another it would close that channel with 406.
        channel = self._channels.get(delivery.channel_number)
        if delivery.session == self._session and channel is not None and channel.is_open:
            getattr(channel, verb)(delivery.tag, **options)
            if self._intake is not None:
                self._intake.settled(delivery.channel_number, delivery.tag)

    def _run(self) -> None:
        backoff = Backoff()
        if (wait := self._not_before - time.monotonic()) > 0:
            backoff.sleep(lambda: self._is_closing, at_least_seconds=wait)
        while not self._is_closing:
            try:
                self._open_session()
                backoff.reset()
                self._pump()
            except Exception as error:  # noqa: BLE001 - the thread's boundary; pika also raises errors that are no AMQPError
                reason = self._error_messages.session_ended(error, is_connected=self._connection is not None)
                log_event(logger, "broker connection lost", logging.WARNING, reason=reason)
                self._drop()
                refused = REFUSED_BACKOFF_SECONDS if isinstance(error, (*REFUSED, QueueUnusable)) else 0.0
                backoff.sleep(lambda: self._is_closing, at_least_seconds=refused)
        self._drop()

    def _open_session(self) -> None:
        self._connection = connect(self._settings, "darkroom consumer")
        self._session += 1
        self._is_cancelled_by_broker = False
        ensure_queues(self._connection, self._names, self._names.shared)
        # Before anything is consumed: without a queue of jobs the session ends, and what it holds would be returned.
        queues = self._open_job_queues()
        self._open_broadcast()
        for subscription in self._subscriptions:
            channel = self._watched_channel()
            channel.basic_qos(prefetch_count=subscription.prefetch)
            self._subscribed[channel] = subscription
            self._consume_on(channel, subscription)
        self.is_connected = True
        log_event(logger, "consuming", queue=", ".join(queues), session=self._session)

    def _open_job_queues(self) -> list[str]:
        """Make the queues of jobs ready to be consumed, and return those that are."""
        if self._job_queues is not None:
            is_stopped = self._is_draining or self._is_paused
            self._intake = self._job_queues.open(self._connection, self._watch, self._on_message, is_stopped=is_stopped)
            return self._intake.queues
        ensure_queues(self._connection, self._names, self._names.family(self._names.jobs))
        if warning := inspect_declaration(self._connection, self._names.jobs):
            log_event(logger, "queue not as it should be", logging.WARNING, reason=warning)
        return [self._names.jobs]

    def _open_broadcast(self) -> None:
        ensure_fanout(self._connection, self._broadcast.exchange)
        channel = self._watched_channel()
        # A queue exclusive to this connection: a broadcast is for the workers connected now.
        queue_name = channel.queue_declare("", exclusive=True).method.queue
        channel.queue_bind(queue_name, self._broadcast.exchange)
        channel.basic_consume(
            queue_name, lambda _channel, _method, _properties, body: self._broadcast.on_message(body), auto_ack=True
        )

    def _watched_channel(self) -> Channel:
        channel = self._connection.channel()
        self._watch(channel)
        return channel

    def _watch(self, channel: Channel) -> None:
        """Have the session be lost when the broker closes the channel or cancels its consumer."""
        channel.add_on_cancel_callback(self._on_cancelled)
        self._channels[channel.channel_number] = channel

    def _consume_on(self, channel: Channel, subscription: Subscription) -> None:
        if not self._is_draining and not (self._is_paused and subscription.is_work):
            on_message = partial(self._on_message, subscription)
            self._tags[channel] = channel.basic_consume(subscription.queue, on_message)

    def _apply_pause(self) -> None:
        for channel, subscription in self._subscribed.items():
            if not channel.is_open or not subscription.is_work:
                continue
            if channel not in self._tags:
                self._consume_on(channel, subscription)
            elif self._is_paused:
                channel.basic_cancel(self._tags.pop(channel))
        if self._intake is not None and not self._is_draining:
            if self._is_paused:
                self._intake.stop()
            else:
                self._intake.resume()

    def _on_cancelled(self, _frame: Any) -> None:
        # The queue was deleted or moved: pika keeps a consumer that gets no more deliveries.
        self._is_cancelled_by_broker = True

    def _on_message(
        self,
        subscription: Subscription,
        channel: Channel,
        method: Any,
        properties: Any,
        body: bytes,
        *,
        received_at: float | None = None,
    ) -> None:
        delivery = delivery_of(
            method,
            properties,
            body,
            queue=subscription.queue,
            names=self._names,
            session=self._session,
            channel_number=channel.channel_number,
            received_at=received_at,
        )
        subscription.on_delivery(delivery)

    def _pump(self) -> None:
        while not self._is_closing:
            self._connection.process_data_events(time_limit=POLL_SECONDS)
            # process_data_events does not raise when only a channel was closed.
            if self._is_cancelled_by_broker or not all(channel.is_open for channel in self._channels.values()):
                raise _SessionLost("the broker closed a channel or cancelled a consumer")
            if self._job_queues is not None:
                self._job_queues.fill()
        self._connection.process_data_events(time_limit=0)

    def _cancel_consumers(self) -> None:
        for channel, tag in self._tags.items():
            if channel.is_open:
                channel.basic_cancel(tag)
        self._tags.clear()
        if self._intake is not None:
            self._intake.stop()

    def _drop(self) -> None:
        if self.is_connected and not self._is_closing:
            self._on_lost()
        self.is_connected = False
        self._channels.clear()
        self._tags.clear()
        self._subscribed.clear()
        self._intake = None
        connection, self._connection = self._connection, None
        close_connection(connection)
