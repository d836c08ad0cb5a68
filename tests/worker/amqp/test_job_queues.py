"""Several queues by weight of which one cannot be used, on the real broker: the others' jobs go on without it."""

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pika
import pika.exceptions
import pytest

from config.broker import BrokerSettings, QueueWeight
from examples.parts.rabbitmq import RabbitMQ
from tests.support.unusable_queues import PASSWORD, USER, all_but, permit, set_state
from tests.support.world import eventually
from worker.amqp.consumer import Consumer
from worker.amqp.delivery import Delivery
from worker.amqp.subscriptions import Broadcast, WeightedSubscription
from worker.amqp.topology import QueueNames, ensure_queues

PLACES = 2


class Taker:
    """A consumer of two queues by weight as a user whose rights differ, and a publisher as another."""

    def __init__(self, rabbitmq: RabbitMQ, caplog: pytest.LogCaptureFixture) -> None:
        self.rabbitmq = rabbitmq
        self._caplog = caplog
        self.ordinary = f"test-{uuid.uuid4().hex[:12]}"
        self.express = f"{self.ordinary}.express"
        self.taken: list[str] = []
        self._in_hand: list[Delivery] = []
        self.names = names = QueueNames(self.ordinary, others=(self.express,))
        self.consumer = Consumer(
            BrokerSettings(
                RABBITMQ_HOST=rabbitmq.host, RABBITMQ_PORT=rabbitmq.port, RABBITMQ_USER=USER, RABBITMQ_PASS=PASSWORD
            ),
            names,
            [],
            Broadcast(names.cancel_exchange, lambda _body: None),
            weighted=WeightedSubscription(
                (QueueWeight(self.express, 3), QueueWeight(self.ordinary, 1)), PLACES, self.take
            ),
        )
        for queue in names.job_queues:
            self.declare(queue)

    def take(self, delivery: Delivery) -> None:
        self.taken.append(delivery.queue)
        self._in_hand.append(delivery)

    def settle(self) -> None:
        eventually(lambda: bool(self._in_hand))
        self.consumer.ack(self._in_hand.pop(0))

    def with_channel(self, work: Callable[[Any], object]) -> None:
        with pika.BlockingConnection(pika.URLParameters(self.rabbitmq.url)) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            work(channel)

    def declare(self, queue: str, **arguments: Any) -> None:
        self.with_channel(lambda channel: channel.queue_declare(queue, durable=True, arguments=arguments))

    def delete(self, queue: str) -> None:
        self.with_channel(lambda channel: channel.queue_delete(queue))

    def publish(self, queue: str, count: int = 1) -> None:
        for _ in range(count):
            self.with_channel(lambda channel: channel.basic_publish("", queue, b"{}", mandatory=True))

    def num_consumers(self, queue: str) -> int:
        counts = []
        self.with_channel(lambda channel: counts.append(channel.queue_declare(queue, passive=True).method))
        return int(counts[0].consumer_count)

    def logged(self, event: str) -> list[dict[str, Any]]:
        return [vars(record)["fields"] for record in self._caplog.records if record.message == event]


@pytest.fixture
def taker(rabbitmq: RabbitMQ, caplog: pytest.LogCaptureFixture) -> Iterator[Taker]:
    caplog.set_level("INFO", "worker")
    made = Taker(rabbitmq, caplog)
    permit(rabbitmq, ".*")
    yield made
    made.consumer.close()


def forbid(taker: Taker, *, is_unusable: bool) -> None:
    permit(taker.rabbitmq, all_but(taker.express) if is_unusable else ".*")


def forbid_a_missing_one(taker: Taker, *, is_unusable: bool) -> None:
    if is_unusable:
        taker.delete(taker.express)
    forbid(taker, is_unusable=is_unusable)


def crash(taker: Taker, *, is_unusable: bool) -> None:
    set_state(taker.rabbitmq, taker.express, "crashed" if is_unusable else "live")


def redeclare(taker: Taker, *, is_unusable: bool) -> None:
    def is_redeclared() -> bool:
        taker.delete(taker.express)
        try:
            taker.declare(taker.express, **({"x-single-active-consumer": True} if is_unusable else {}))
        except pika.exceptions.ChannelClosedByBroker:
            return False  # the consumer tries all the time, and asking for the arguments made the missing queue anew
        return True

    eventually(is_redeclared)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (forbid, "access to queue 'EXPRESS"),
        (forbid_a_missing_one, "access to queue 'EXPRESS' in vhost '/' refused for user"),
        (crash, "NOT_FOUND - queue 'EXPRESS' in vhost '/' has crashed"),
        (redeclare, "one worker gets every job"),
    ],
    ids=["forbidden", "missing", "crashed", "single"],
)
def test_a_queue_that_cannot_be_used_is_left_out_and_joins_the_session_once_it_can(
    taker: Taker, monkeypatch: pytest.MonkeyPatch, make: Callable[..., None], reason: str
) -> None:
    monkeypatch.setattr("worker.amqp.job_queues.RETRY_SECONDS", 0.0)
    make(taker, is_unusable=True)
    taker.publish(taker.ordinary, 4)
    taker.consumer.start()

    for _ in range(4):
        taker.settle()

    [warning] = taker.logged("queue left out")
    assert warning["queue"] == taker.express
    assert reason.replace("EXPRESS", taker.express) in warning["reason"]
    make(taker, is_unusable=False)
    eventually(lambda: len(taker.logged("queue available again")) == 1)
    taker.publish(taker.express)
    taker.settle()
    assert taker.taken == [taker.ordinary] * 4 + [taker.express]
    # It was tried again in the session that went on meanwhile, and told once
    assert taker.logged("queue left out") == [warning]
    assert [line["queue"] for line in taker.logged("consuming")] == [taker.ordinary]
    assert not taker.logged("broker connection lost")


def test_a_pause_and_a_lost_connection_say_nothing_new_of_a_queue_that_is_left_out(
    taker: Taker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.amqp.job_queues.RETRY_SECONDS", 0.0)
    # Given one that is whole, so that nothing but a request for a message is refused
    taker.with_channel(lambda channel: ensure_queues(channel.connection, taker.names, taker.names.everything))
    forbid(taker, is_unusable=True)
    taker.consumer.start()
    eventually(lambda: taker.consumer.is_connected)

    taker.consumer.pause(is_paused=True)
    taker.rabbitmq.close_connections()
    eventually(lambda: len(taker.logged("consuming")) == 2)
    taker.publish(taker.ordinary)
    taker.consumer.pause(is_paused=False)
    taker.settle()
    taker.rabbitmq.close_connections()
    eventually(lambda: len(taker.logged("consuming")) == 3)

    assert len(taker.logged("queue left out")) == 1
    assert len(taker.logged("broker connection lost")) == 2
    assert not taker.logged("queue available again")


def test_without_any_queue_that_can_be_used_the_session_ends_and_says_why(taker: Taker) -> None:
    permit(taker.rabbitmq, f"^({taker.ordinary}[.](recover|outbox|dead|lease|cancel)|amq[.]gen.*|amq[.]default)$")
    taker.consumer.start()

    eventually(lambda: len(taker.logged("broker connection lost")) >= 2)

    assert not taker.logged("consuming")
    assert {line["queue"] for line in taker.logged("queue left out")} == {taker.express, taker.ordinary}
    assert len(taker.logged("queue left out")) == 2
    for line in taker.logged("broker connection lost"):
        assert f"access to queue '{taker.ordinary}" in line["reason"]


@pytest.mark.parametrize("num_jobs", [0, PLACES + 1], ids=["consumed", "asked"])
def test_a_queue_deleted_in_mid_session_is_made_again_in_the_next_one(taker: Taker, num_jobs: int) -> None:
    """While there are places the broker cancels the consumer; while there are none, it refuses the next request."""
    taker.publish(taker.ordinary, num_jobs)
    taker.consumer.start()
    eventually(lambda: len(taker.taken) == min(num_jobs, PLACES) and taker.consumer.is_connected)
    if not num_jobs:
        eventually(lambda: taker.num_consumers(taker.express) == 1)

    taker.delete(taker.express)
    if num_jobs:
        taker.settle()
    eventually(lambda: len(taker.logged("consuming")) == 2)
    taker.publish(taker.express)

    while taker.express not in taker.taken:
        taker.settle()
    assert len(taker.logged("broker connection lost")) == 1
    assert not taker.logged("queue left out")
