"""What follows from several queues of jobs: the worker's own queues, and what a delivery is known to come from."""

from types import SimpleNamespace
from typing import Any

import pika
import pika.exceptions
import pytest

from worker.amqp.content_headers import Properties
from worker.amqp.delivery import CRASHES_HEADER, PRIORITY_HEADER, QUEUE_HEADER, Delivery, Origin, delivery_of
from worker.amqp.topology import RETRY_DELAYS_SECONDS, QueueNames, is_missing

ONE, TWO = QueueNames("jobs"), QueueNames("jobs", others=("jobs.express",))


def test_each_queue_of_jobs_has_retry_queues_that_lead_back_to_it_and_all_else_is_shared() -> None:
    added = set(TWO.everything) - set(ONE.everything)

    assert added == {"jobs.express", *(f"jobs.express.retry.{delay}" for delay in RETRY_DELAYS_SECONDS)}
    for jobs in TWO.job_queues:
        assert TWO.arguments[jobs] == {}
        for delay in RETRY_DELAYS_SECONDS:
            assert TWO.arguments[TWO.retry(delay, jobs)]["x-dead-letter-routing-key"] == jobs


def test_a_job_of_a_queue_that_these_settings_do_not_name_is_tried_again_in_the_one_that_they_do() -> None:
    assert ONE.retry(30, "jobs.express") == "jobs.retry.30"
    assert TWO.retry(30, "") == "jobs.retry.30"


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("jobs", "jobs"),
        ("jobs.express", "jobs"),
        ("jobs.dead", "dead"),
        ("jobs.retry.30", "retry.30"),
        ("jobs.express.retry.30", "retry.30"),
    ],
)
def test_a_queue_s_role_is_the_same_whichever_queue_it_belongs_to(name: str, role: str) -> None:
    assert TWO.role(name) == role


def delivered(queue: str, priority: int | None = None, **headers: Any) -> Delivery:
    encoded = b"".join(pika.BasicProperties(headers=headers, priority=priority).encode())
    method = SimpleNamespace(redelivered=False, delivery_tag=1)
    return delivery_of(method, Properties(encoded), b"", queue=queue, names=TWO, session=1, channel_number=1)


def test_a_delivery_knows_the_queue_and_the_priority_that_it_was_published_with() -> None:
    assert delivered("jobs.express", 9).origin == Origin("jobs.express", 9)
    assert delivered("jobs").origin == Origin("jobs", None)


@pytest.mark.parametrize(("carried", "priority"), [(7, 7), (0, 0), (255, 255), (256, None), (-1, None), ("9", None)])
def test_a_copy_that_waited_has_its_priority_in_a_header(carried: Any, priority: int | None) -> None:
    for queue in ("jobs", "jobs.recover"):
        assert delivered(queue, **{PRIORITY_HEADER: carried}).origin.priority == priority
    assert delivered("jobs.recover", 3, **{PRIORITY_HEADER: carried}).origin.priority == 3


@pytest.mark.parametrize(
    ("code", "said", "is_so"),
    [
        (404, "NOT_FOUND - no queue 'jobs' in vhost '/'", True),
        (404, "NOT_FOUND - home node 'rabbit@one' of durable queue 'jobs' in vhost '/' is down or inaccessible", False),
        (404, "NOT_FOUND - queue 'no queue' in vhost '/' has crashed and failed to restart", False),
        (404, "NOT_FOUND - failed to perform operation on queue 'jobs' in vhost '/' due to timeout", False),
        (403, "ACCESS_REFUSED - access to queue 'jobs' in vhost '/' refused for user 'me'", False),
    ],
)
def test_a_queue_is_missing_only_where_the_broker_knows_of_none(code: int, said: str, is_so: bool) -> None:
    assert is_missing(pika.exceptions.ChannelClosedByBroker(code, said)) is is_so


def test_a_queue_is_waiting_where_messages_leave_it_by_the_clock() -> None:
    waiting = {name for name in TWO.everything if TWO.is_waiting(name)}

    retries = {TWO.retry(delay, jobs) for jobs in TWO.job_queues for delay in RETRY_DELAYS_SECONDS}
    assert waiting == {"jobs.lease", *retries}
    assert not TWO.is_waiting("another's")


def test_a_copy_s_origin_is_its_header_and_that_of_a_publisher_counts_for_nothing() -> None:
    claims = {QUEUE_HEADER: "jobs.express", CRASHES_HEADER: 5}

    copy = delivered("jobs.recover", 3, **claims)
    assert (copy.origin, copy.num_crashes) == (Origin("jobs.express", 3), 5)
    for queue in TWO.job_queues:
        forged = delivered(queue, **claims)
        assert (forged.origin, forged.num_crashes) == (Origin(queue, None), 0)
