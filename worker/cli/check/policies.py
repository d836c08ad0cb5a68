"""Find the limits that policies set on the worker's queues: by the management interface, else by trying.

AMQP does not expose policies. The management interface does, queue by queue, where it answers at its usual port. Else
queues are declared whose names begin like ours: a policy for all queues, or for that prefix, drops their messages.
"""

import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from worker.amqp.publisher import QUEUE_FULL
from worker.amqp.topology import DELIVERY_LIMIT, QueueNames

LIMITS = ("delivery-limit", "max-length", "max-length-bytes", "message-ttl", "expires")
# Enough to meet RabbitMQ 4's default limit of 20, where a policy sets that.
NUM_PUBLISHED, PUBLISHED_BYTES, NUM_RETURNS = 32, 1024, 25
RETURN_SECONDS = 0.5
PROBE = {"x-queue-type": "quorum", "x-delivery-limit": DELIVERY_LIMIT, "x-expires": 60_000}

_Channel = Any  # pika has no type hints


def limits_in(definitions: Mapping[str, Mapping[str, Any]], names: QueueNames) -> list[str]:
    """Return the limits on our own queues in the definitions by queue, one sentence each. Pure."""
    sentences = []
    for name in sorted(set(names.everything) - set(names.job_queues)):
        definition = definitions.get(name, {})
        found = ", ".join(f"{limit}: {definition[limit]}" for limit in LIMITS if limit in definition)
        sentences += [f"{name} has {found}"] if found else []
    return sentences


def limits_found_by_trying(connection: Any, names: QueueNames) -> list[str]:
    """Publish to queues named like ours and return the limits met, one sentence each; the queues are deleted."""
    sentences = []
    with _probe(connection, names) as (channel, name):
        with suppress(QUEUE_FULL):  # by `overflow: reject-publish`
            for _ in range(NUM_PUBLISHED):
                _publish(channel, name)
        num_kept = channel.queue_declare(name, passive=True).method.message_count
    if num_kept != NUM_PUBLISHED:
        seen = f"of {NUM_PUBLISHED} messages {num_kept} were kept"
        sentences.append(f"{seen} (max-length, max-length-bytes or message-ttl)")

    with _probe(connection, names) as (channel, name):
        with suppress(QUEUE_FULL):
            _publish(channel, name)
        for number in range(NUM_RETURNS):
            tag = _take(channel, name)
            if tag is None:
                sentences.append(f"a message returned {number} times was dropped (delivery-limit or message-ttl)")
                break
            channel.basic_reject(tag, requeue=True)
    return sentences


@contextmanager
def _probe(connection: Any, names: QueueNames) -> Iterator[tuple[_Channel, str]]:
    name = f"{names.outbox}.check-{uuid.uuid4().hex[:8]}"
    with connection.channel() as channel:
        channel.confirm_delivery()
        channel.queue_declare(name, durable=True, arguments=PROBE)
        try:
            yield channel, name
        finally:
            if channel.is_open:
                channel.queue_delete(name)


def _publish(channel: _Channel, name: str) -> None:
    channel.basic_publish("", name, bytes(PUBLISHED_BYTES), mandatory=True)


def _take(channel: _Channel, name: str) -> int | None:
    """Return the delivery tag of the next message, waiting for one being requeued; None where there is none."""
    deadline = time.monotonic() + RETURN_SECONDS
    while time.monotonic() < deadline:
        method, _, _ = channel.basic_get(name)
        if method is not None:
            return int(method.delivery_tag)
    return None
