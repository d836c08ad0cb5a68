"""What the broker counts when messages come back, and at which it drops them: nothing of ours is lost by it.

RabbitMQ 4 has a limit of 20 on every quorum queue; here a policy sets one, so that 3.10 drops as well. `make matrix`
runs this file, in its long form, on RabbitMQ 4.
"""

import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pika
import pika.exceptions
import pytest

from config.broker import BrokerSettings
from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.station import Job, start_light_worker
from tests.support.long import IS_LONG, long
from tests.support.servers.broker_admin import policy
from tests.support.world import Worker, World, eventually, new_world
from worker.amqp.delivery import CRASHES_HEADER, LEASE_HEADER
from worker.amqp.queue_browser import QueueBrowser
from worker.amqp.topology import DELIVERY_LIMIT, QueueNames, declare_queue
from worker.cli.dead.letters import DeadLetter
from worker.jobs.recovery import SUSPECT_CRASHES

# RabbitMQ 4's, and a lower one that a policy may set.
BROKERS_LIMIT = 20 if IS_LONG else 3
NUM_LOSSES = 40 if IS_LONG else BROKERS_LIMIT + 2
NUM_LANES = 10
# Short waits between tries of a webhook, an engine that may be held for long, and few crashes until a job is given up.
# In all tests the same, as workers with the same changes cost the least.
CONSTANTS = {
    "worker.results.notifier:PATIENCE_SECONDS": 0.0,
    "worker.results.notifier:DELAYS_SECONDS": (0.2, 0.5),
    "inference.process.health:MIN_HANG_SECONDS": 600.0,
    "worker.supervisor:GRACE_RESERVE_SECONDS": 1.0,
    "worker.jobs.disposition:MAX_RECOVERIES": 4,
}
QUORUM = {"x-queue-type": "quorum"}


@pytest.fixture
def world(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path: Path) -> Iterator[World]:
    with new_world(rabbitmq, s3_server, tmp_path) as made:
        yield made


@contextmanager
def limits(world: World, pattern: str, **definition: Any) -> Iterator[None]:
    """Set a policy on the queues whose names end in `pattern`."""
    with policy(world.rabbitmq, f"limits-{uuid.uuid4().hex[:8]}", f"^{world.queue}{pattern}", definition):
        yield


@contextmanager
def channel_to(world: World) -> Iterator[Any]:
    with pika.BlockingConnection(pika.URLParameters(world.rabbitmq.url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        yield channel


def declare_as_older_workers_did(world: World) -> None:
    """Declare quorum queues without a limit of their own."""
    names = QueueNames(world.queue)
    with channel_to(world) as channel:
        for name in (names.recover, names.outbox, names.dead):
            channel.queue_declare(name, durable=True, arguments=QUORUM)


def put_into_recover(world: World, body: bytes, **headers: int) -> None:
    names = QueueNames(world.queue)
    with channel_to(world) as channel:
        declare_queue(channel.connection, names.recover, names.arguments[names.recover])
        channel.basic_publish("", names.recover, body, pika.BasicProperties(delivery_mode=2, headers=headers))


def message(job: Job, prompt: str = "a fox") -> bytes:
    fields = {"generation_id": job.generation_id, "prompt": prompt, "num_inference_steps": 8}
    return json.dumps({"task_id": job.task_id, "data": fields}).encode()


def new_job(number: int) -> Job:
    return Job(str(uuid.uuid4()), number)


def start(world: World, **env: str) -> Worker:
    return start_light_worker(world, constants=CONSTANTS, FAULTS_FOLDER=str(world.folder), **env)


def lose_connections(world: World, worker: Worker) -> None:
    """Close every connection, and return once the worker consumes again."""
    num_lost = len(worker.events("broker connection lost"))

    def is_back() -> bool:
        lost = worker.events("broker connection lost")
        if len(lost) == num_lost:
            world.rabbitmq.close_connections()  # again, perhaps: one that is just being opened is missed
            return False
        # Not by their number: a connection may be lost before it consumes, by an error of the broker's own.
        return any(line["time"] > lost[-1]["time"] for line in worker.events("consuming"))

    eventually(is_back, worker.log_tail)


def go_on(world: World, job: Job) -> None:
    (world.folder / f"go-{job.task_id}").touch()


def wait_for(world: World, **depths: tuple[int, int]) -> None:
    """Return once these of the worker's queues have so many messages ready and in a worker's hands."""
    wanted = {f".{name}": depth for name, depth in depths.items()}
    eventually(lambda: wanted.items() <= world.queues().items(), lambda: str(world.queues()))


def wait_until_replaced(worker: Worker) -> None:
    """Return once copies of the event and of the job that the last loss returned are here, whose count begins at 0.

    To be in hand is not enough: a message that is returned once more before it was replaced is counted twice.
    """

    def are_replaced() -> bool:
        lost_at = worker.events("broker connection lost")[-1]["time"]
        adopted = [line["time"] for line in worker.events("delivery adopted") if not line["is_redelivered"]]
        renewed = [line["time"] for line in worker.events("returned event renewed")]
        return all(times and times[-1] > lost_at for times in (adopted, renewed))

    eventually(are_replaced, worker.log_tail)


def assert_complete(world: World, *jobs: Job) -> None:
    """Assert that each end was delivered once, and nothing is left anywhere."""
    for job in jobs:
        assert world.wait_for_end(job.generation_id).kind == "complete"
    world.wait_until_clean()
    assert all(len(world.backend.ends(job.generation_id)) == 1 for job in jobs)


def test_connections_lost_again_and_again_lose_neither_a_parked_event_nor_a_recovered_job(world: World) -> None:
    """On queues that an older worker made, which have the broker's limit."""
    declare_as_older_workers_did(world)
    parked, broken = new_job(1), new_job(2)
    with limits(world, r"\.(recover|outbox|dead)$", **{"delivery-limit": BROKERS_LIMIT}):
        # Given an end that the backend does not take, and a job that a killed worker left
        world.backend.answer("complete", 500)
        worker = start(world, LOG_LEVEL="DEBUG")
        world.publish_raw(message(parked))
        wait_for(world, outbox=(0, 1))
        put_into_recover(world, message(broken, "hold@3"))
        eventually(lambda: f" held {broken.task_id}" in journal(world), worker.log_tail)

        # When every connection is closed more often than the broker gives a message back
        for _ in range(NUM_LOSSES):
            lose_connections(world, worker)
            wait_until_replaced(worker)

        # And the worker is killed once, then the next one draws the job, and both ends are told
        worker.kill()
        start(world)
        go_on(world, broken)
        world.backend.answer("complete", 200)
        for job in (parked, broken):
            eventually(lambda: "complete" in outcomes(world, job), world.workers[-1].log_tail)  # noqa: B023
        world.wait_until_clean()
        assert world.backend.calls("failed") == []


def outcomes(world: World, job: Job) -> list[str]:
    return [call.kind for call in world.backend.ends(job.generation_id)]


@pytest.mark.parametrize("num_deployments", [pytest.param(12, marks=long), 5])
def test_deployments_in_the_middle_of_a_long_job_are_no_crashes(world: World, num_deployments: int) -> None:
    # Given a job that was recovered, held by more workers that stop in order than it may have crashes
    job = new_job(1)
    put_into_recover(world, message(job, "hold@3"))

    for number in range(num_deployments):
        worker = start(world, SHUTDOWN_GRACE_SECONDS="1")
        held = f" held {job.task_id}"
        eventually(lambda: journal(world).count(held) == number + 1, worker.log_tail)  # noqa: B023
        assert worker.terminate() == 0
        # One at least: an ack that was not sent before the worker ended leaves the message beside its copy
        eventually(lambda: world.queues()[".recover"][0] >= 1, lambda: str(world.queues()))

    # Then the next one draws it
    start(world)
    go_on(world, job)
    assert_complete(world, job)


def journal(world: World) -> str:
    path = world.folder / "journal"
    return path.read_text() if path.exists() else ""


@long
def test_an_event_parked_outlives_forty_restarts(world: World) -> None:
    declare_as_older_workers_did(world)
    job = new_job(1)
    with limits(world, r"\.outbox$", **{"delivery-limit": BROKERS_LIMIT}):
        world.backend.answer("complete", 500)
        world.publish_raw(message(job))
        for number in range(NUM_LOSSES):
            worker = start(world, LOG_LEVEL="DEBUG")
            wait_for(world, outbox=(0, 1))
            if number:
                eventually(lambda: bool(worker.events("returned event renewed")), worker.log_tail)  # noqa: B023
            if number % 4:
                assert worker.terminate() == 0
            else:
                worker.kill()

        start(world)
        world.backend.answer("complete", 200)
        eventually(lambda: "complete" in outcomes(world, job), world.workers[-1].log_tail)
        world.wait_until_clean()


def test_a_policy_with_every_limit_loses_no_end(world: World) -> None:
    """What the queue refuses stays with its job; what it drops is told from memory, or is at least a dead letter."""
    jobs = [new_job(number) for number in range(1, 6)]
    narrow = {"delivery-limit": 1, "max-length": 1, "max-length-bytes": 5000, "message-ttl": 1000}
    with limits(world, r"\.(recover|outbox)$", **narrow):
        world.backend.answer("complete", 500)
        worker = start(world)
        world.publish_raw(*(message(job) for job in jobs))
        eventually(lambda: len(world.keys("generations/")) == len(jobs), worker.log_tail)
        eventually(lambda: bool(worker.events("webhook parked")), worker.log_tail)
        for _ in range(2):
            lose_connections(world, worker)
        world.backend.answer("complete", 200)

        def all_delivered() -> bool:
            dead = {generation_of(json.loads(body)) for body in bodies_of_dead_letters(world)}
            return all(len(outcomes(world, job)) == 1 or job.generation_id in dead for job in jobs)

        eventually(all_delivered, worker.log_tail)
        assert all(len(outcomes(world, job)) <= 1 for job in jobs)


def generation_of(body: dict[str, Any]) -> int:
    """Return whose end an event of `.outbox` is, or whose job a message of `.recover`."""
    return int(body.get("data", body)["generation_id"])


def bodies_of_dead_letters(world: World) -> list[bytes]:
    """Read the dead letters, and leave them where they are."""
    bodies = []
    with channel_to(world) as channel:
        while (got := channel.basic_get(f"{world.queue}.dead"))[0] is not None:
            bodies.append(got[2])
    return bodies


def test_a_message_at_a_policy_s_limit_becomes_a_dead_letter(world: World) -> None:
    """A limit of none is the one that no worker can stay below; the queue's own arguments then keep the message."""
    names = QueueNames(world.queue)
    with channel_to(world) as channel:
        for name in (names.dead, names.outbox):
            declare_queue(channel.connection, name, names.arguments[name])
        with limits(world, r"\.outbox$", **{"delivery-limit": 0}):
            channel.basic_publish("", names.outbox, b"an event", pika.BasicProperties(delivery_mode=2))
            eventually(lambda: is_given_back(channel, names.outbox))
            wait_for(world, dead=(1, 0), outbox=(0, 0))
    with QueueBrowser(BrokerSettings(**world.rabbitmq.env()), names.dead) as inspection:  # type: ignore[arg-type]
        (held,) = inspection.fetch(10)
    assert (held.body, names.outbox in DeadLetter(1, held, None).reason) == (b"an event", True)


def test_a_full_queue_refuses_what_is_published_and_keeps_what_it_has(world: World) -> None:
    names = QueueNames(world.queue)
    with limits(world, r"\.outbox$", **{"max-length": 2}), channel_to(world) as channel:
        declare_queue(channel.connection, names.outbox, names.arguments[names.outbox])
        published = []
        with pytest.raises(pika.exceptions.NackError):
            for number in range(20):
                channel.basic_publish("", names.outbox, f"{number}".encode(), pika.BasicProperties(delivery_mode=2))
                published.append(number)

        assert [int(channel.basic_get(names.outbox)[2]) for _ in published] == published


def is_given_back(channel: Any, queue: str) -> bool:
    method, _, _ = channel.basic_get(queue)
    if method is not None:
        channel.basic_reject(method.delivery_tag, requeue=True)
    return method is not None


def test_every_queue_of_ours_has_a_limit_that_no_message_reaches(world: World) -> None:
    arguments = QueueNames("jobs").arguments
    assert arguments.pop("jobs") == {}
    # -1 would be unlimited on 4.x, and on 3.10 drops at the first return.
    assert {name: declared["x-delivery-limit"] for name, declared in arguments.items()} == dict.fromkeys(
        arguments, DELIVERY_LIMIT
    )
    assert {declared["x-overflow"] for declared in arguments.values()} == {"reject-publish"}


def test_queue_declared_otherwise_a_moment_ago_is_used_as_it_is(world: World) -> None:
    """Two workers of two versions see that it is missing, and both declare it."""
    names = QueueNames(world.queue)
    with channel_to(world) as channel:
        channel.queue_declare(names.outbox, durable=True, arguments=QUORUM)
        declare_queue(channel.connection, names.outbox, names.arguments[names.outbox])
        assert channel.connection.is_open


# --- Recovered jobs


def test_recovered_jobs_come_as_many_at_once_as_there_are_lanes(world: World) -> None:
    jobs = [new_job(number) for number in range(1, NUM_LANES + 3)]
    for job in jobs:
        put_into_recover(world, message(job, "hold@3"))

    start(world)

    wait_for(world, recover=(2, NUM_LANES))
    for job in jobs:
        go_on(world, job)
    assert_complete(world, *jobs)


def test_a_job_that_several_workers_were_killed_with_is_done_with_no_recovered_one_beside_it(world: World) -> None:
    suspect, *others = [new_job(number) for number in range(1, 5)]
    for job in (suspect, *others):
        put_into_recover(world, message(job, "hold@3"), **{CRASHES_HEADER: SUSPECT_CRASHES})

    worker = start(world, RABBITMQ_CONSUMER_TIMEOUT_SECONDS="6")  # copies are put off for a second

    eventually(lambda: " held " in journal(world), worker.log_tail)
    first = journal(world).split(" held ")[1].split()[0]
    eventually(lambda: world.queues()[".recover"][1] == 1, lambda: str(world.queues()))
    assert len(worker.events("job in")) == 1
    for job in (suspect, *others):
        go_on(world, job)
    assert_complete(world, suspect, *others)
    assert first in {job.task_id for job in (suspect, *others)}


def test_a_job_on_lease_whose_worker_was_killed_has_one_crash_more(world: World) -> None:
    """Its message was acked, so that the broker counts nothing: the note that nobody took away tells it."""
    job = new_job(1)
    note = {"until": time.time() - 60, "num_crashes": 4}
    world.upload(f"jobs/{job.task_id}.lease", json.dumps(note).encode())
    put_into_recover(world, message(job), **{LEASE_HEADER: 1, CRASHES_HEADER: 4})

    start(world)

    end = world.wait_for_end(1)
    assert (end.kind, end.body.get("error_code")) == ("failed", "WORKER_CRASHED")


def test_crashes_that_a_publisher_claims_count_for_nothing(world: World) -> None:
    job = new_job(1)
    start(world)
    with channel_to(world) as channel:
        forged = pika.BasicProperties(delivery_mode=2, headers={CRASHES_HEADER: 100, "x-delivery-count": 100})
        channel.basic_publish("", world.queue, message(job), forged)

    assert_complete(world, job)
