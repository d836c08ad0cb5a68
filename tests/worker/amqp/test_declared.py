"""How a queue of jobs was declared is read from refusals, and a worker says what it cannot take jobs from."""

import uuid
from collections.abc import Iterator
from typing import Any

import pika
import pytest

from config.broker import BrokerSettings, QueueWeight
from examples.parts.rabbitmq import RabbitMQ
from tests.support.world import eventually
from worker.amqp.consumer import Consumer
from worker.amqp.declared import declared_arguments
from worker.amqp.subscriptions import Broadcast, Subscription, WeightedSubscription
from worker.amqp.topology import QueueNames

SINGLE = {"x-single-active-consumer": True}


@pytest.fixture
def connection(rabbitmq: RabbitMQ) -> Iterator[Any]:
    with pika.BlockingConnection(pika.URLParameters(rabbitmq.url)) as made:
        yield made


def declare(connection: Any, **arguments: Any) -> str:
    name = f"test-{uuid.uuid4().hex[:12]}"
    connection.channel().queue_declare(name, durable=True, arguments=arguments)
    return name


def consumer_of(rabbitmq: RabbitMQ, queue: str, *, weighted: bool = False) -> Consumer:
    names = QueueNames(queue)
    return Consumer(
        BrokerSettings(RABBITMQ_HOST=rabbitmq.host, RABBITMQ_PORT=rabbitmq.port, RABBITMQ_QUEUE=queue),
        names,
        [] if weighted else [Subscription(queue, 1, lambda _delivery: None)],
        Broadcast(names.cancel_exchange, lambda _body: None),
        weighted=WeightedSubscription((QueueWeight(queue, 1),), 1, lambda _delivery: None) if weighted else None,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"x-max-priority": 5, "x-message-ttl": 60_000, "x-max-length": 100, "x-overflow": "reject-publish"} | SINGLE,
        {"x-queue-type": "quorum", "x-delivery-limit": 5, "x-dead-letter-exchange": "it's given 'up'"},
        {"x-queue-type": "stream"},
    ],
    ids=["none", "classic", "quorum", "stream"],
)
def test_all_arguments_are_found_and_the_queue_stays_as_it_is(connection: Any, arguments: dict[str, Any]) -> None:
    name = declare(connection, **arguments)

    found = [declared_arguments(connection, name) for _ in range(2)]

    assert found == [arguments, arguments]


def test_a_stream_is_not_consumed_and_the_log_says_why(
    rabbitmq: RabbitMQ, connection: Any, caplog: pytest.LogCaptureFixture
) -> None:
    consumer = consumer_of(rabbitmq, declare(connection, **{"x-queue-type": "stream"}))
    consumer.start()

    eventually(lambda: any("is a stream" in str(vars(record)) for record in caplog.records))

    assert not consumer.is_connected
    consumer.close()


@pytest.mark.parametrize("weighted", [False, True])
def test_a_single_active_consumer_is_warned_of_and_refused_by_weight(
    rabbitmq: RabbitMQ, connection: Any, caplog: pytest.LogCaptureFixture, weighted: bool
) -> None:
    consumer = consumer_of(rabbitmq, declare(connection, **SINGLE), weighted=weighted)
    consumer.start()

    eventually(lambda: any("one worker gets every job" in str(vars(record)) for record in caplog.records))

    if weighted:
        assert not consumer.is_connected
    else:
        eventually(lambda: consumer.is_connected)
    consumer.close()
