"""Returned events get fresh copies, or are sent as they are."""

import threading
from typing import Any

from worker.amqp.delivery import Delivery
from worker.amqp.publisher import PublishFailed
from worker.results.republisher import NUM_TRIES, Republisher

HANG_SECONDS = 120.0


def returned(tag: int, session: int = 2) -> Delivery:
    return Delivery(
        body=b"event %d" % tag,
        queue="jobs.outbox",
        is_redelivered=True,
        attempt=7,
        num_deliveries=1,
        since=100.0,
        session=session,
        tag=tag,
        channel_number=1,
        due=200.0,
    )


class Broker:
    """A consumer in session 2 and a publisher at once; of its first publishes so many fail."""

    def __init__(self, num_failures: int = 0) -> None:
        self.num_failures = num_failures
        self.published: list[tuple[str, bytes, dict[str, Any]]] = []
        self.acked: list[int] = []
        self.has_acked = threading.Semaphore(0)

    def holds(self, delivery: Delivery) -> bool:
        return delivery.session == 2

    def ack(self, delivery: Delivery) -> None:
        assert self.published, "acked before the copy was confirmed"
        self.acked.append(delivery.tag)
        self.has_acked.release()

    def publish(self, queue_name: str, body: bytes, **options: Any) -> None:
        if self.num_failures:
            self.num_failures -= 1
            raise PublishFailed("not now")
        self.published.append((queue_name, body, options))


def test_a_returned_event_is_acked_once_its_copy_is_confirmed_and_keeps_its_age_and_attempt() -> None:
    broker, taken = Broker(num_failures=NUM_TRIES - 1), list[Delivery]()
    renewer = Republisher(broker, taken.append)  # type: ignore[arg-type]
    renewer.start(broker)  # type: ignore[arg-type]

    renewer.add(returned(1))

    assert broker.has_acked.acquire(timeout=HANG_SECONDS)
    renewer.close()
    assert broker.published == [("jobs.outbox", b"event 1", {"attempt": 7, "reason": "", "since": 100.0, "due": 200.0})]
    assert (broker.acked, taken) == ([1], [])


def test_event_of_a_lost_session_is_not_copied() -> None:
    broker = Broker()
    renewer = Republisher(broker, lambda _: None)  # type: ignore[arg-type]
    renewer.start(broker)  # type: ignore[arg-type]

    renewer.add(returned(1, session=1))
    renewer.add(returned(2))

    assert broker.has_acked.acquire(timeout=HANG_SECONDS)
    renewer.close()
    assert [body for _, body, _ in broker.published] == [b"event 2"]


def test_returned_events_are_sent_as_they_are_where_the_broker_takes_no_copies() -> None:
    broker, taken, are_taken = Broker(num_failures=10**6), list[int](), threading.Semaphore(0)

    def take(delivery: Delivery) -> None:
        taken.append(delivery.tag)
        are_taken.release()

    renewer = Republisher(broker, take)  # type: ignore[arg-type]
    renewer.add(returned(1))
    renewer.add(returned(2))
    renewer.start(broker)  # type: ignore[arg-type]

    assert all(are_taken.acquire(timeout=HANG_SECONDS) for _ in range(2))
    renewer.close()
    assert (taken, broker.acked) == ([1, 2], [])
