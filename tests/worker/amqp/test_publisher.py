"""The copies of jobs on the real broker: what they carry, and what is left of it behind a queue in which they wait."""

import uuid
from collections.abc import Iterator

import pytest

from config.broker import BrokerSettings
from examples.parts.rabbitmq import RabbitMQ
from tests.support.unusable_queues import PASSWORD, USER, all_but, permit
from tests.support.world import eventually
from worker.amqp.connection import Channel, close_connection, connect
from worker.amqp.delivery import Delivery, Origin, delivery_of
from worker.amqp.publisher import Publisher, PublishFailed
from worker.amqp.topology import RETRY_DELAYS_SECONDS, QueueNames, ensure_queues


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
    ensure_queues(channel.connection, names, names.shared)
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


def test_a_queue_of_jobs_that_cannot_be_used_stops_nothing_that_is_published_elsewhere(
    rabbitmq: RabbitMQ, settings: BrokerSettings, names: QueueNames
) -> None:
    [express] = names.others
    permit(rabbitmq, all_but(express))
    user = {"RABBITMQ_USER": USER, "RABBITMQ_PASS": PASSWORD}
    publisher = Publisher(BrokerSettings(RABBITMQ_HOST=settings.host, RABBITMQ_PORT=settings.port, **user), names)
    publisher.start()

    # Nothing is there yet, and no other queue is made than those published to
    assert publisher.num_workers() == 0
    for queue in (names.dead, names.retry(RETRY_DELAYS_SECONDS[0])):
        publisher.publish(queue, b"{}")
        with pytest.raises(PublishFailed, match=f"access to queue '{express}"):
            publisher.publish(names.retry(RETRY_DELAYS_SECONDS[0], express), b"{}")
    eventually(lambda: publisher.depths() == {names.dead: 1, names.retry(RETRY_DELAYS_SECONDS[0]): 1})
    publisher.close()
