"""The copies that must be confirmed before an ack, on the real broker, while the worker stops."""

import threading
import uuid
from typing import Any, cast

from config.broker import BrokerSettings
from examples.parts.rabbitmq import RabbitMQ
from tests.support.world import eventually
from tests.worker.jobs.test_runs import delivered
from worker.amqp.delivery import Delivery
from worker.amqp.publisher import Publisher, PublishFailed
from worker.amqp.topology import QueueNames
from worker.jobs.recovery import SuspectIsolation
from worker.jobs.settler import Settler


class NotingConsumer:
    """Holds every delivery, and notes how each was settled."""

    def __init__(self) -> None:
        self.settled: list[str] = []

    def holds(self, _delivery: Delivery) -> bool:
        return True

    def ack(self, _delivery: Delivery) -> None:
        self.settled.append("ack")

    def requeue(self, _delivery: Delivery) -> None:
        self.settled.append("requeue")


class CutOff(Publisher):
    """Loses its connection, unseen, right before its first copy."""

    def __init__(self, rabbitmq: RabbitMQ, names: QueueNames) -> None:
        super().__init__(BrokerSettings(RABBITMQ_HOST=rabbitmq.host, RABBITMQ_PORT=rabbitmq.port), names)
        self._rabbitmq, self._has_lost_one = rabbitmq, False

    def publish(self, *where_and_what: Any, **options: Any) -> None:
        if not self._has_lost_one:
            self._has_lost_one = True
            self._rabbitmq.close_connections()
        super().publish(*where_and_what, **options)


class Refused:
    """Publishes nothing, as the broker is gone."""

    num_calls = 0

    def publish(self, *_where_and_what: Any, **_options: Any) -> None:
        self.num_calls += 1
        raise PublishFailed("the broker is gone")


def stopping_settler(publisher: Publisher | Refused, names: QueueNames, consumer: NotingConsumer) -> Settler:
    is_draining = threading.Event()
    is_draining.set()
    settler = Settler(cast("Any", publisher), cast("Any", None), names, SuspectIsolation(), is_draining)
    settler.start(cast("Any", consumer))
    return settler


def test_a_connection_that_died_unseen_costs_a_stopping_worker_no_copy(rabbitmq: RabbitMQ) -> None:
    """What is requeued instead would be dropped by a full queue, and by one with a time to live."""
    names, consumer = QueueNames(f"test-{uuid.uuid4().hex[:12]}"), NotingConsumer()
    publisher = CutOff(rabbitmq, names)
    publisher.start()
    publisher.depths()

    stopping_settler(publisher, names, consumer).move(delivered(1), names.recover)

    assert consumer.settled == ["ack"]
    eventually(lambda: publisher.depths()[names.recover] == 1)
    publisher.close()


def test_a_broker_that_confirms_nothing_is_asked_twice_by_a_worker_that_stops() -> None:
    consumer, publisher, names = NotingConsumer(), Refused(), QueueNames("jobs")

    stopping_settler(publisher, names, consumer).move(delivered(1), names.recover)

    assert (consumer.settled, publisher.num_calls) == (["requeue"], 2)
