"""The publishing connection: every message persistent, mandatory and confirmed."""

import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import pika
import pika.exceptions

from config.broker import BrokerSettings
from config.redacting import redacted
from worker.amqp.connection import CLOSE_SECONDS, LOST, POLL_SECONDS, Channel, Connection, close_connection, connect
from worker.amqp.delivery import (
    ATTEMPT_HEADER,
    CRASHES_HEADER,
    DUE_HEADER,
    LEASE_HEADER,
    MAX_REASON_CHARS,
    NO_ORIGIN,
    PRIORITY_HEADER,
    QUEUE_HEADER,
    REASON_HEADER,
    SINCE_HEADER,
    Origin,
)
from worker.amqp.error_messages import ErrorMessages
from worker.amqp.topology import QueueNames, ensure_fanout, ensure_queues, inspect_queues

QUEUE_FULL = pika.exceptions.NackError

Result = TypeVar("Result")


class PublishFailed(Exception):
    """The broker did not confirm the message; it may or may not have it."""


class Publisher:
    """Owner of the publishing connection and its thread. Every message is persistent, mandatory and confirmed."""

    def __init__(self, settings: BrokerSettings, names: QueueNames) -> None:
        self._settings = settings
        self._error_messages = ErrorMessages(settings)
        self._names = names
        self._connection: Connection = None
        self._channel: Channel = None
        self._tasks: queue.Queue[tuple[Callable[[], Any], Future[Any]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Publish queued messages, then close."""
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
        origin: Origin = NO_ORIGIN,
    ) -> None:
        """Publish and return once the broker has confirmed the message on disk; raise `PublishFailed` otherwise."""
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
        if origin.queue and origin.queue != self._names.jobs:
            headers[QUEUE_HEADER] = origin.queue
        priority = origin.priority
        if priority is not None and self._names.is_waiting(queue_name):
            headers[PRIORITY_HEADER], priority = priority, None
        headers |= origin.trace.headers
        self._call(partial(self._publish, queue_name, body, headers, priority))

    def depths(self) -> dict[str, int]:
        """Return the number of ready messages by queue, without queues that are missing or cannot be used.

        Raises `PublishFailed`.
        """
        found = self._call(lambda: inspect_queues(self._connection, self._names.everything))
        return {name: queue.message_count for name, queue in found.items()}

    def num_workers(self) -> int:
        """Return the number of workers that take jobs: each consumes `recover` then, and by weight a queue of jobs only
        while that is empty."""
        found = self._call(lambda: inspect_queues(self._connection, [self._names.recover]))
        return sum(queue.consumer_count for queue in found.values())

    def _call(self, work: Callable[[], Result]) -> Result:
        """Run `work` on the thread, with an open channel."""
        future: Future[Result] = Future()
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
            work, future = task
            try:
                self._ensure_channel()
                future.set_result(work())
            except Exception as error:  # noqa: BLE001 - the thread's boundary; any error is passed to the caller
                reason = self._error_messages.session_ended(error, is_connected=self._connection is not None)
                self._drop()
                future.set_exception(PublishFailed(reason))

    def _publish(self, queue_name: str, body: bytes, headers: dict[str, Any], priority: int | None) -> None:
        properties = pika.BasicProperties(
            delivery_mode=2,
            content_type="application/json",
            headers=headers,
            timestamp=int(time.time()),
            priority=priority,
        )
        send = partial(self._channel.basic_publish, "", queue_name, body, properties, mandatory=True)
        try:
            send()
        except pika.exceptions.UnroutableError:
            # Missing yet, or deleted. No other queue is looked at: one that cannot be used must not stop the rest.
            ensure_queues(self._connection, self._names, [queue_name])
            send()

    def _ensure_channel(self) -> None:
        if self._channel is not None and self._channel.is_open:
            return
        self._drop()
        self._connection = connect(self._settings, "darkroom publisher")
        self._channel = self._connection.channel()
        self._channel.confirm_delivery()

    def _keep_alive(self) -> None:
        """Serve heartbeats while nothing is published."""
        if self._connection is not None:
            try:
                self._connection.process_data_events(time_limit=0)
            except LOST:
                self._drop()

    def _drop(self) -> None:
        connection, self._connection, self._channel = self._connection, None, None
        close_connection(connection)


def broadcast(settings: BrokerSettings, exchange: str, bodies: Sequence[bytes]) -> bool:
    """Publish to the fanout `exchange`; return False where no queue is bound to it. Raises `PublishFailed`."""
    connection: Connection = None
    try:
        connection = connect(settings, "darkroom cancel")
        ensure_fanout(connection, exchange)
        with connection.channel() as channel:
            channel.confirm_delivery()
            for body in bodies:
                channel.basic_publish(exchange, "", body, mandatory=True)
    except pika.exceptions.UnroutableError:
        return False
    except LOST as error:
        reason = ErrorMessages(settings).session_ended(error, is_connected=connection is not None)
        raise PublishFailed(reason) from error
    finally:
        close_connection(connection)
    return True
