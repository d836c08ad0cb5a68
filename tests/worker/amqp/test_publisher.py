"""The copies of jobs on the real broker: what they carry, and what is left of it behind a queue in which they wait."""

import uuid
from collections.abc import Iterator

import pytest

from config.broker import BrokerSettings
from examples.parts.rabbitmq import RabbitMQ
from tests.support.world import eventually
from worker.amqp.connection import Channel, close_connection, connect
from worker.amqp.delivery import Delivery, Origin, delivery_of
from worker.amqp.publisher import Publisher
from worker.amqp.topology import RETRY_DELAYS_SECONDS, QueueNames


@pytest.fixture
def settings(rabbitmq: RabbitMQ) -> BrokerSettings:
    return BrokerSettings(RABBITMQ_HOST=rabbitmq.host, RABBITMQ_PORT=rabbitmq.port)


@pytest.fixture
def names() -> QueueNames:
    jobs = f"test-{uuid.uuid4().hex[:12]}"
    return QueueNames(jobs, consumer_timeout_seconds=0.6, others=(f"{jobs}.express",))


@pytest.fixture
def publisher(settings: BrokerSettings, names: QueueNames) -> Iterator[Publisher]:
    made = Publisher(settings, names)
    made.start()
    yield made
    made.close()


@pytest.fixture
def channel(settings: BrokerSettings) -> Iterator[Channel]:
    connection = connect(settings, "test")
    yield connection.channel()
    close_connection(connection)


def take(channel: Channel, names: QueueNames, queue: str) -> tuple[int | None, Delivery]:
    """Wait for a message; return the priority that the broker sorts it by, and the delivery."""
    found = []

    def is_there() -> bool:
        method, properties, body = channel.basic_get(queue, auto_ack=True)
        if method is not None:
            found.append((method, properties, body))
        return bool(found)

    eventually(is_there)
    [(method, properties, body)] = found
    delivery = delivery_of(method, properties, body, queue=queue, names=names, session=1, channel_number=1)
    return properties.priority, delivery


def test_a_copy_that_waits_is_none_that_the_broker_prefers_and_has_its_priority_behind_it(
    publisher: Publisher, channel: Channel, names: QueueNames
) -> None:
    """RabbitMQ 4 looks at the message alone that it would deliver next: as long as urgent copies come, no other would
    leave the queue."""
    origin = Origin(names.others[0], 7)
    retry = names.retry(RETRY_DELAYS_SECONDS[0], origin.queue)

    publisher.publish(retry, b"{}", origin=origin)
    publisher.publish(names.lease, b"{}", is_leased=True, origin=origin)

    preferred, waiting = take(channel, names, retry)
    assert (preferred, waiting.origin) == (None, origin)
    preferred, recovered = take(channel, names, names.recover)
    assert (preferred, recovered.origin, recovered.is_leased) == (None, origin, True)

    # In the queues that they are consumed from they are as urgent as they were
    for queue in (names.recover, names.dead):
        publisher.publish(queue, b"{}", origin=recovered.origin)
        preferred, delivery = take(channel, names, queue)
        assert (preferred, delivery.origin) == (7, origin)
