"""Several queues by weight, on the real broker: what is taken, in which order, and how much is held."""

import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pika
import pytest

from config.broker import BrokerSettings, QueueWeight
from examples.parts.rabbitmq import RabbitMQ
from tests.support.long import long
from tests.support.world import eventually
from worker.amqp.consumer import Consumer
from worker.amqp.delivery import Delivery
from worker.amqp.fair_share import FairShare
from worker.amqp.intake import Intake, Message
from worker.amqp.subscriptions import Broadcast, WeightedSubscription
from worker.amqp.topology import QueueNames

PLACES = 4
QUORUM = {"x-queue-type": "quorum"}


class Taker:
    """A consumer of two queues by weight, and a publisher. Deliveries are settled one by one, on request."""

    def __init__(self, rabbitmq: RabbitMQ, express: int = 3, **arguments: Any) -> None:
        self.rabbitmq = rabbitmq
        self.ordinary = f"test-{uuid.uuid4().hex[:12]}"
        self.express = f"{self.ordinary}.express"
        queues = (QueueWeight(self.express, express), QueueWeight(self.ordinary, 1))
        self.settings = BrokerSettings(RABBITMQ_HOST=rabbitmq.host, RABBITMQ_PORT=rabbitmq.port)
        self.names = QueueNames(self.ordinary, others=(self.express,))
        self.lock = threading.Lock()
        self.in_hand: list[Delivery] = []
        self.taken: list[str] = []
        self.most_in_hand = 0
        self.connection = pika.BlockingConnection(pika.URLParameters(rabbitmq.url))
        self.channel = self.connection.channel()
        self.channel.confirm_delivery()
        for name in self.names.job_queues:
            self.channel.queue_declare(name, durable=True, arguments=arguments)
        self.consumer = Consumer(
            self.settings,
            self.names,
            [],
            Broadcast(self.names.cancel_exchange, lambda _body: None),
            weighted=WeightedSubscription(queues, PLACES, self.take),
        )

    def take(self, delivery: Delivery) -> None:
        with self.lock:
            self.in_hand.append(delivery)
            self.taken.append(delivery.queue.removeprefix(self.ordinary) or "ordinary")
            self.most_in_hand = max(self.most_in_hand, len(self.in_hand))

    def publish(self, queue: str, count: int = 1, priority: int | None = None) -> None:
        for _ in range(count):
            body = uuid.uuid4().bytes
            self.channel.basic_publish("", queue, body, pika.BasicProperties(delivery_mode=2, priority=priority))

    def settle_oldest(self) -> Delivery:
        eventually(lambda: bool(self.in_hand), str)
        with self.lock:
            delivery = self.in_hand.pop(0)
        self.consumer.ack(delivery)
        return delivery

    def num_consumers(self) -> int:
        """Count those of the two queues that wait for the first message of an empty one."""
        found = [self.channel.queue_declare(name, passive=True).method for name in self.names.job_queues]
        return sum(one.consumer_count for one in found)

    def wait_for(self, *, ready: int, unacked: int) -> None:
        """Return once the two queues have so many messages together, and those that are unacknowledged are in hand."""

        def is_so() -> bool:
            return self.depths() == (ready, unacked) and len(self.in_hand) == unacked

        eventually(is_so, lambda: str(self.rabbitmq.queues()))

    def depths(self) -> tuple[int, int]:
        """Count the messages of the two queues together, ready and unacknowledged."""
        found = self.rabbitmq.queues()
        ready, unacked = zip(*(found[name] for name in self.names.job_queues), strict=True)
        return sum(ready), sum(unacked)


@pytest.fixture(params=[pytest.param({}, id="classic"), pytest.param(QUORUM, id="quorum", marks=long)])
def taker(rabbitmq: RabbitMQ, request: pytest.FixtureRequest) -> Iterator[Taker]:
    made = Taker(rabbitmq, **request.param)
    yield made
    made.consumer.close()
    made.connection.close()


def test_starts_are_by_weight_even_where_all_places_become_free_at_once(taker: Taker) -> None:
    taker.publish(taker.ordinary, 24)
    taker.publish(taker.express, 24)
    taker.consumer.start()

    for num_settled in range(0, 32, PLACES):
        taker.wait_for(ready=48 - num_settled - PLACES, unacked=PLACES)
        for _ in range(PLACES):
            taker.settle_oldest()
    taker.wait_for(ready=12, unacked=PLACES)

    assert Counter(taker.taken[:32]) == {".express": 24, "ordinary": 8}
    assert taker.taken[:8] == [".express", "ordinary", ".express", ".express"] * 2
    assert taker.most_in_hand == PLACES


def test_an_empty_queue_s_places_go_to_the_other_and_its_first_message_is_the_next_to_start(taker: Taker) -> None:
    taker.publish(taker.ordinary, 12)
    taker.consumer.start()
    taker.wait_for(ready=8, unacked=PLACES)
    for _ in range(4):
        taker.settle_oldest()
    taker.wait_for(ready=4, unacked=PLACES)

    taker.publish(taker.express)
    # It is left for other workers as long as there is no place here
    taker.wait_for(ready=5, unacked=PLACES)
    taker.settle_oldest()

    taker.wait_for(ready=4, unacked=PLACES)
    assert taker.taken == ["ordinary"] * 8 + [".express"]


def test_messages_that_come_to_empty_queues_are_taken_at_once_while_there_are_places(taker: Taker) -> None:
    taker.consumer.start()
    for number in range(1, 13):
        taker.publish(taker.express if number % 3 else taker.ordinary)
        eventually(lambda: len(taker.taken) == number)  # noqa: B023
        if number >= PLACES:
            taker.settle_oldest()

    # And of what comes while there is none, at most one of each queue is held that was empty
    while taker.in_hand:
        taker.settle_oldest()
    taker.wait_for(ready=0, unacked=0)
    taker.publish(taker.express, 10)
    taker.publish(taker.ordinary, 10)
    held: list[int] = []

    def are_all_counted() -> bool:
        ready, unacked = taker.depths()
        held.append(unacked)
        return ready + unacked == 20 and unacked >= PLACES

    eventually(are_all_counted)
    assert held[-1] <= PLACES + 2
    for _ in range(20):
        taker.settle_oldest()
    taker.wait_for(ready=0, unacked=0)
    assert taker.most_in_hand == PLACES


def test_a_pause_takes_nothing_and_the_end_of_it_goes_on_by_weight(taker: Taker) -> None:
    taker.consumer.start()
    eventually(lambda: taker.num_consumers() == 2)
    taker.consumer.pause(is_paused=True)
    # Until then one message of each queue may still come
    eventually(lambda: taker.num_consumers() == 0)
    taker.publish(taker.ordinary, 4)
    taker.publish(taker.express, 4)
    taker.wait_for(ready=8, unacked=0)

    taker.consumer.pause(is_paused=False)

    taker.wait_for(ready=4, unacked=PLACES)
    assert Counter(taker.taken) == {".express": 3, "ordinary": 1}


def test_a_worker_that_stops_takes_nothing_more_and_keeps_what_it_has(taker: Taker) -> None:
    taker.publish(taker.express, 6)
    taker.consumer.start()
    taker.wait_for(ready=2, unacked=PLACES)

    taker.consumer.stop_consuming()
    for _ in range(PLACES):
        taker.settle_oldest()

    taker.wait_for(ready=2, unacked=0)


def test_after_a_lost_connection_every_message_comes_again(taker: Taker) -> None:
    taker.publish(taker.express, 3)
    taker.publish(taker.ordinary, 3)
    taker.consumer.start()
    taker.wait_for(ready=2, unacked=PLACES)
    with taker.lock:
        lost = taker.in_hand.copy()
        taker.in_hand.clear()

    taker.rabbitmq.close_connections()
    taker.connection = pika.BlockingConnection(pika.URLParameters(taker.rabbitmq.url))

    eventually(lambda: len(taker.in_hand) == PLACES)
    assert not any(taker.consumer.holds(delivery) for delivery in lost)
    bodies = {taker.settle_oldest().body for _ in range(6)}
    assert len(bodies) == 6
    taker.wait_for(ready=0, unacked=0)


def test_within_a_queue_priorities_count_up_to_the_start(rabbitmq: RabbitMQ) -> None:
    """What is held was not sorted again by the broker: so nothing is held."""
    taker = Taker(rabbitmq, **{"x-max-priority": 10})
    taker.publish(taker.ordinary, 8, priority=1)
    taker.consumer.start()
    taker.wait_for(ready=4, unacked=PLACES)

    taker.publish(taker.ordinary, 1, priority=9)
    for _ in range(PLACES + 1):
        last = taker.settle_oldest()

    assert (last.origin.queue, last.origin.priority) == (taker.ordinary, 9)
    taker.consumer.close()
    taker.connection.close()


class EmptyChannel:
    """Stands in for the channels to queues that are empty until `deliver`."""

    channel_number = 1

    def __init__(self) -> None:
        self._consumers: dict[str, Any] = {}

    def basic_qos(self, *, prefetch_count: int) -> None:
        """Deliver as the test says."""

    def basic_get(self, _queue: str) -> tuple[None, None, None]:
        return None, None, None

    def basic_consume(self, queue: str, on_message: Any) -> str:
        self._consumers[queue] = on_message
        return queue

    def basic_cancel(self, _tag: str) -> None:
        """Deliver as the test says."""

    def deliver(self, queue: str, tag: int) -> None:
        self._consumers[queue](self, SimpleNamespace(delivery_tag=tag), None, b"")


def test_a_message_that_waits_for_a_place_came_when_it_was_delivered() -> None:
    """A lease is taken by that time: the broker's consumer timeout does not wait for the place."""
    channel, started = EmptyChannel(), list[Message]()
    share = FairShare((QueueWeight("express", 3), QueueWeight("ordinary", 1)))
    intake = Intake(share, 1, started.append)
    for queue in ("express", "ordinary"):
        intake.join(queue, channel)
    intake.fill()
    channel.deliver("express", 1)
    channel.deliver("ordinary", 2)
    delivered_at = time.monotonic()

    intake.fill()
    intake.settled(channel.channel_number, 1)
    intake.fill()

    assert [message.queue for message in started] == ["express", "ordinary"]
    assert all(message.received_at <= delivered_at for message in started)
