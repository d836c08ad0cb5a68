"""AMQP: the only file that knows pika, beside `broker_refusals.py`, `content_headers.py`, `inspection.py` and
`checks/broker.py`.

Two connections on two threads. The consuming one carries deliveries and acks and nothing else: behind a publish that
the broker holds back (memory or disk alarm) an ack would be held back too. The publishing one confirms every message.
`BlockingConnection` is not thread-safe; other threads cross over by `add_callback_threadsafe` or a queue only.
"""

import logging
import math
import queue
import random
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pika
import pika.exceptions

from config.broker import BrokerSettings
from config.logs import log_event
from config.redacting import redacted
from worker.amqp.content_headers import TolerantConnection
from worker.amqp.delivery import Delivery, whole_number
from worker.amqp.refusals import Refusals, describe
from worker.amqp.topology import QueueNames

# A broker that is back has jobs waiting, and a try that is refused costs nobody anything.
MIN_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.2, 1.0
BACKOFF_POLL_SECONDS = 0.05

logger = logging.getLogger(__name__)

ATTEMPT_HEADER = "x-darkroom-attempt"
REASON_HEADER = "x-darkroom-reason"
SINCE_HEADER = "x-darkroom-since"
DUE_HEADER = "x-darkroom-due"
LEASE_HEADER = "x-darkroom-lease"
CRASHES_HEADER = "x-darkroom-crashes"
COUNT_HEADER = "x-delivery-count"
MAX_REASON_CHARS = 500

NOT_FOUND, PRECONDITION_FAILED = 404, 406  # AMQP's reply codes

POLL_SECONDS = 0.5
STACK_TIMEOUT_SECONDS = 5.0  # a broker that accepts and then says nothing must not hold us for ever
BLOCKED_TIMEOUT_SECONDS = 5.0
REFUSED_BACKOFF_SECONDS = 30.0  # wrong password or vhost: a person must act, and brokers count such tries
CLOSE_SECONDS = 3.0

_Connection = Any  # pika has no type hints
_Channel = Any
LOST = (pika.exceptions.AMQPError, OSError)
NOT_TAKEN = pika.exceptions.NackError  # by a queue that is full
_REFUSED = (pika.exceptions.ProbableAuthenticationError, pika.exceptions.ProbableAccessDeniedError)


class PublishFailed(Exception):
    """The broker did not confirm the message; it may or may not have it."""


@dataclass(frozen=True, slots=True)
class Subscription:
    """`on_delivery` runs on the consuming thread: it must return at once and never raise. `is_work`: new deliveries
    stop while the consumer is paused."""

    queue: str
    prefetch: int
    on_delivery: Callable[[Delivery], None]
    is_work: bool = True


@dataclass(frozen=True, slots=True)
class Broadcast:
    """`on_message` hears every message of the fanout `exchange` while connected, on the consuming thread."""

    exchange: str
    on_message: Callable[[bytes], None]


class _SessionLost(Exception):
    """The broker cancelled a consumer or closed a channel while the connection stayed up."""


class Consumer:
    """Owner of the consuming connection and its thread. Reconnects for ever until closed."""

    def __init__(
        self,
        settings: BrokerSettings,
        names: QueueNames,
        subscriptions: list[Subscription],
        broadcast: Broadcast,
        on_lost: Callable[[], None] = lambda: None,
        *,
        not_before: float = 0.0,
    ) -> None:
        """`on_lost` runs on the consuming thread when what was delivered may go to somebody else: it must be quick.
        The broker is not asked `not_before` a moment of `time.monotonic()`."""
        self._settings = settings
        self._refusals = Refusals(settings)
        self._names = names
        self._subscriptions = subscriptions
        self._broadcast = broadcast
        self._on_lost = on_lost
        self._not_before = not_before
        self._connection: _Connection = None
        self._channels: dict[int, _Channel] = {}
        self._tags: dict[_Channel, str] = {}
        self._subscribed: dict[_Channel, Subscription] = {}
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
        """Take no more deliveries; those in hand stay ours, heartbeats flow, settling goes on."""
        self._is_draining = True
        self._on_connection(self._cancel_consumers)

    def pause(self, *, is_paused: bool) -> None:
        """Take no more work, or take it again; what is no work flows on. Deliveries in hand stay ours."""
        if is_paused != self._is_paused:
            self._is_paused = is_paused
            self._on_connection(self._apply_pause)

    def close(self) -> None:
        """Send what is still to be settled, then close; unsettled deliveries go back to their queues."""
        self._is_closing = True
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)

    def ack(self, delivery: Delivery) -> None:
        """Tell the broker to forget the message. Nothing comes back: a lost ack shows as a redelivery."""
        self._on_connection(partial(self._settle, delivery, "basic_ack", {}))

    def holds(self, delivery: Delivery) -> bool:
        """Whether the message is still ours to settle; after a lost connection the broker has it again."""
        return delivery.session == self._session and self.is_connected

    def requeue(self, delivery: Delivery) -> None:
        """Give the message back for another consumer. RabbitMQ up to 4.2 counts it as a delivery of the message."""
        self._on_connection(partial(self._settle, delivery, "basic_nack", {"requeue": True}))

    def _on_connection(self, action: Callable[[], None]) -> None:
        connection = self._connection
        if connection is None:
            return
        # Lost meanwhile: what was to be settled will be delivered again.
        with suppress(pika.exceptions.ConnectionWrongStateError):
            connection.add_callback_threadsafe(action)

    def _settle(self, delivery: Delivery, verb: str, options: Mapping[str, Any]) -> None:
        # A tag means something only on the channel it came from: on another it would close that channel with 406.
        channel = self._channels.get(delivery.channel_number)
        if delivery.session == self._session and channel is not None and channel.is_open:
            getattr(channel, verb)(delivery.tag, **options)

    def _run(self) -> None:
        backoff = Backoff()
        if (wait := self._not_before - time.monotonic()) > 0:
            backoff.sleep(lambda: self._is_closing, at_least_seconds=wait)
        while not self._is_closing:
            try:
                self._open_session()
                backoff.reset()
                self._pump()
            except Exception as error:  # noqa: BLE001 - the thread's boundary; pika also raises what is no AMQPError
                reason = self._refusals.no_session(error, is_connected=self._connection is not None)
                log_event(logger, "broker connection lost", logging.WARNING, reason=reason)
                self._drop()
                refused = REFUSED_BACKOFF_SECONDS if isinstance(error, _REFUSED) else 0.0
                backoff.sleep(lambda: self._is_closing, at_least_seconds=refused)
        self._drop()

    def _open_session(self) -> None:
        self._connection = connect(self._settings, "darkroom consumer")
        self._session += 1
        self._is_cancelled_by_broker = False
        _ensure_queues(self._connection, self._names)
        self._listen(self._broadcast)
        for subscription in self._subscriptions:
            self._subscribe(subscription)
        self.is_connected = True
        log_event(logger, "consuming", queue=self._names.jobs, session=self._session)

    def _subscribe(self, subscription: Subscription) -> None:
        channel = self._connection.channel()
        channel.basic_qos(prefetch_count=subscription.prefetch)
        channel.add_on_cancel_callback(self._note_cancel)
        self._channels[channel.channel_number] = channel
        self._subscribed[channel] = subscription
        self._consume_on(channel, subscription)

    def _consume_on(self, channel: _Channel, subscription: Subscription) -> None:
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

    def _listen(self, broadcast: Broadcast) -> None:
        """A queue of this connection's own, gone with it: an order is for the workers that are here."""
        _ensure_fanout(self._connection, broadcast.exchange)
        channel = self._connection.channel()
        queue_name = channel.queue_declare("", exclusive=True).method.queue
        channel.queue_bind(queue_name, broadcast.exchange)
        channel.basic_consume(
            queue_name, lambda _channel, _method, _properties, body: broadcast.on_message(body), auto_ack=True
        )
        channel.add_on_cancel_callback(self._note_cancel)
        self._channels[channel.channel_number] = channel

    def _note_cancel(self, _frame: Any) -> None:
        # The queue was deleted or moved: pika would go on happily with a consumer that gets nothing.
        self._is_cancelled_by_broker = True

    def _on_message(
        self, subscription: Subscription, channel: _Channel, method: Any, properties: Any, body: bytes
    ) -> None:
        headers, now = properties.headers, int(time.time())
        subscription.on_delivery(
            Delivery(
                body=body,
                queue=subscription.queue,
                is_redelivered=method.redelivered,
                attempt=max(1, whole_number(headers.get(ATTEMPT_HEADER), default=1)),
                num_deliveries=self._number_of_ours(subscription, headers, COUNT_HEADER),
                since=float(min(whole_number(headers.get(SINCE_HEADER), default=now), now)),
                session=self._session,
                tag=method.delivery_tag,
                channel_number=channel.channel_number,
                received_at=time.monotonic(),
                # In the jobs' queue the headers could only be a publisher's own.
                is_leased=subscription.queue == self._names.recover and LEASE_HEADER in headers,
                due=float(whole_number(headers.get(DUE_HEADER), default=0)),
                reason=str(headers.get(REASON_HEADER, ""))[:MAX_REASON_CHARS],
                num_crashes=self._number_of_ours(subscription, headers, CRASHES_HEADER),
            )
        )

    def _number_of_ours(self, subscription: Subscription, headers: Mapping[str, Any], name: str) -> int:
        # Neither we nor the broker write these in the jobs' classic queue: there they could only be a publisher's own.
        return whole_number(headers.get(name), default=0) if subscription.queue != self._names.jobs else 0

    def _pump(self) -> None:
        while not self._is_closing:
            self._connection.process_data_events(time_limit=POLL_SECONDS)
            # process_data_events does not raise when only a channel was closed.
            if self._is_cancelled_by_broker or not all(channel.is_open for channel in self._channels.values()):
                raise _SessionLost("the broker closed a channel or cancelled a consumer")
        self._connection.process_data_events(time_limit=0)

    def _cancel_consumers(self) -> None:
        for channel, tag in self._tags.items():
            if channel.is_open:
                channel.basic_cancel(tag)
        self._tags.clear()

    def _drop(self) -> None:
        if self.is_connected and not self._is_closing:
            self._on_lost()
        self.is_connected = False
        self._channels.clear()
        self._tags.clear()
        self._subscribed.clear()
        connection, self._connection = self._connection, None
        close_connection(connection)


class Publisher:
    """Owner of the publishing connection and its thread. Every message is persistent, mandatory and confirmed."""

    def __init__(self, settings: BrokerSettings, names: QueueNames) -> None:
        self._settings = settings
        self._refusals = Refusals(settings)
        self._names = names
        self._connection: _Connection = None
        self._channel: _Channel = None
        self._tasks: queue.Queue[tuple[Callable[[], Any], Future[Any]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Publish what is queued, then close."""
        self._tasks.put(None)
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)

    def publish(
        self,
        queue_name: str,
        body: bytes,
        *,
        attempt: int | None = None,
        reason: str = "",
        since: float | None = None,
        due: float | None = None,
        is_leased: bool = False,
        num_crashes: int = 0,
    ) -> None:
        """Return once the broker has confirmed the message on disk; raise `PublishFailed` otherwise."""
        headers: dict[str, Any] = {} if attempt is None else {ATTEMPT_HEADER: attempt}
        if reason:
            headers[REASON_HEADER] = redacted(reason)[:MAX_REASON_CHARS]
        if since is not None:
            headers[SINCE_HEADER] = int(since)
        if due is not None:
            headers[DUE_HEADER] = math.ceil(due)
        if is_leased:
            headers[LEASE_HEADER] = 1
        if num_crashes:
            headers[CRASHES_HEADER] = num_crashes
        self._call(partial(self._publish, queue_name, body, headers))

    def depths(self) -> dict[str, int]:
        """Messages ready in each of the worker's queues."""
        return self._call(self._count)  # type: ignore[no-any-return]

    def num_consumers(self) -> int:
        """How many consumers the jobs' queue has: a worker that takes jobs is one."""
        return self._call(partial(self._num_consumers, self._names.jobs))  # type: ignore[no-any-return]

    def _call(self, work: Callable[[], Any]) -> Any:
        future: Future[Any] = Future()
        self._tasks.put((work, future))
        return future.result()

    def _run(self) -> None:
        while True:
            try:
                task = self._tasks.get(timeout=POLL_SECONDS)
            except queue.Empty:
                self._keep_alive()
                continue
            if task is None:
                close_connection(self._connection)
                return
            self._do(*task)

    def _do(self, work: Callable[[], Any], future: Future[Any]) -> None:
        try:
            self._ensure_channel()
            future.set_result(work())
        except Exception as error:  # noqa: BLE001 - the thread's boundary; the caller must hear of it, whatever it was
            reason = self._refusals.no_session(error, is_connected=self._connection is not None)
            self._drop()
            future.set_exception(PublishFailed(reason))

    def _publish(self, queue_name: str, body: bytes, headers: dict[str, Any]) -> None:
        properties = pika.BasicProperties(
            delivery_mode=2, content_type="application/json", headers=headers, timestamp=int(time.time())
        )
        send = partial(self._channel.basic_publish, "", queue_name, body, properties, mandatory=True)
        try:
            send()
        except pika.exceptions.UnroutableError:
            _ensure_queues(self._connection, self._names)  # somebody deleted the queue
            send()

    def _count(self) -> dict[str, int]:
        look = partial(self._channel.queue_declare, passive=True)
        return {name: look(name).method.message_count for name in self._names.everything}

    def _num_consumers(self, name: str) -> int:
        return int(self._channel.queue_declare(name, passive=True).method.consumer_count)

    def _ensure_channel(self) -> None:
        if self._channel is not None and self._channel.is_open:
            return
        self._drop()
        self._connection = connect(self._settings, "darkroom publisher")
        _ensure_queues(self._connection, self._names)
        self._channel = self._connection.channel()
        self._channel.confirm_delivery()

    def _keep_alive(self) -> None:
        if self._connection is None:
            return
        try:
            self._connection.process_data_events(time_limit=0)
        except LOST:
            self._drop()

    def _drop(self) -> None:
        connection, self._connection, self._channel = self._connection, None, None
        close_connection(connection)


def connect(settings: BrokerSettings, name: str) -> _Connection:
    parameters = pika.URLParameters(settings.amqp_url)
    parameters.heartbeat = settings.heartbeat_seconds
    parameters.socket_timeout = STACK_TIMEOUT_SECONDS
    parameters.stack_timeout = STACK_TIMEOUT_SECONDS
    parameters.blocked_connection_timeout = BLOCKED_TIMEOUT_SECONDS
    parameters.client_properties = {"connection_name": f"{name} on {socket.gethostname()}"}
    parameters.tcp_options = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 15000}
    return pika.BlockingConnection(parameters, _impl_class=TolerantConnection)


class FirstTry(NamedTuple):
    """Why the broker cannot be used, empty where it can, and when it may be asked again, in `time.monotonic()`."""

    reason: str = ""
    again_at: float = 0.0


def try_broker(settings: BrokerSettings) -> FirstTry:
    """Connect once and close."""
    try:
        close_connection(connect(settings, "darkroom start"))
    except Exception as error:  # noqa: BLE001 - pika raises also what is no AMQPError; the consumer tries again for ever
        again_at = time.monotonic() + REFUSED_BACKOFF_SECONDS if isinstance(error, _REFUSED) else 0.0
        return FirstTry(Refusals(settings).no_connection(error), again_at)
    return FirstTry()


def broadcast(settings: BrokerSettings, exchange: str, bodies: Sequence[bytes]) -> bool:
    """Publish to all that listen on the fanout `exchange`; False where nothing does. Raises `PublishFailed`."""
    connection: _Connection = None
    try:
        connection = connect(settings, "darkroom cancel")
        _ensure_fanout(connection, exchange)
        with connection.channel() as channel:
            channel.confirm_delivery()
            for body in bodies:
                channel.basic_publish(exchange, "", body, mandatory=True)
    except pika.exceptions.UnroutableError:
        return False
    except LOST as error:
        raise PublishFailed(Refusals(settings).no_session(error, is_connected=connection is not None)) from error
    finally:
        close_connection(connection)
    return True


def _ensure_queues(connection: _Connection, names: QueueNames) -> None:
    """Make the queues that are missing and take the others as they are: a declaration never disturbs one."""
    for name, arguments in names.arguments.items():
        try:
            with connection.channel() as channel:
                channel.queue_declare(name, passive=True)
        except pika.exceptions.ChannelClosedByBroker as error:
            if error.reply_code != NOT_FOUND:
                raise
            make_queue(connection, name, arguments)


def make_queue(connection: _Connection, name: str, arguments: Mapping[str, Any]) -> None:
    """Make the queue. One that was made otherwise since it was found missing stays as it is."""
    try:
        with connection.channel() as channel:
            channel.queue_declare(name, durable=True, arguments=dict(arguments))
    except pika.exceptions.ChannelClosedByBroker as error:
        # A worker of another version was quicker.
        if error.reply_code != PRECONDITION_FAILED:
            raise


def _ensure_fanout(connection: _Connection, exchange: str) -> None:
    try:
        with connection.channel() as channel:
            channel.exchange_declare(exchange, passive=True)
    except pika.exceptions.ChannelClosedByBroker as error:
        if error.reply_code != NOT_FOUND:
            raise
        with connection.channel() as channel:
            channel.exchange_declare(exchange, exchange_type="fanout", durable=True)


def close_connection(connection: _Connection) -> None:
    if connection is None or not connection.is_open:
        return
    try:
        connection.close()
    except LOST as error:
        log_event(logger, "connection was gone before it was closed", logging.DEBUG, reason=describe(error))


class Backoff:
    """Full jitter between tries, the ceiling doubling up to `MAX_BACKOFF_SECONDS`."""

    def __init__(self) -> None:
        self._ceiling = MIN_BACKOFF_SECONDS

    def reset(self) -> None:
        self._ceiling = MIN_BACKOFF_SECONDS

    def sleep(self, is_over: Callable[[], bool], *, at_least_seconds: float = 0.0) -> None:
        """Wait before the next try, or until `is_over`."""
        seconds = random.uniform(MIN_BACKOFF_SECONDS / 2, self._ceiling)  # noqa: S311 - jitter, not a secret
        self._ceiling = min(MAX_BACKOFF_SECONDS, self._ceiling * 2)
        deadline = time.monotonic() + max(seconds, at_least_seconds)
        while time.monotonic() < deadline and not is_over():
            time.sleep(BACKOFF_POLL_SECONDS)
