"""Queues of jobs beside the plain one: several by weight, quorum, with priorities, with limits of their own.

Whatever the backend declares, a job returns to the queue that it came from, and neither a deployment nor a killed
worker costs it. `make matrix` runs this file on RabbitMQ 4.
"""

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pika
import pytest

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.station import QUICK_RETRIES, RETRY_SECONDS, Job, start_light_worker
from tests.support.long import long
from tests.support.world import Worker, World, eventually, new_world
from worker.amqp.delivery import QUEUE_HEADER
from worker.jobs.disposition import MAX_ATTEMPTS

QUORUM = {"x-queue-type": "quorum"}
LIMITED = QUORUM | {"x-delivery-limit": 1, "x-dead-letter-exchange": ""}
TTL_MS = 1500
# A held job counts as hanging after this, a worker that stops keeps its jobs no longer than this, and a job with more
# crashes is given up. In all tests the same, as workers with the same changes cost the least.
CONSTANTS = QUICK_RETRIES | {
    "inference.process.health:MIN_HANG_SECONDS": 600.0,
    "worker.supervisor:GRACE_RESERVE_SECONDS": 1.0,
    "worker.jobs.disposition:MAX_RECOVERIES": 2,
}


@pytest.fixture
def world(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path: Path) -> Iterator[World]:
    with new_world(rabbitmq, s3_server, tmp_path) as made:
        yield made


@contextmanager
def channel_to(world: World) -> Iterator[Any]:
    with pika.BlockingConnection(pika.URLParameters(world.rabbitmq.url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        yield channel


def declare(world: World, queue: str, **arguments: Any) -> None:
    """Declare the queue, and one for its dead letters where it has an exchange for them."""
    with channel_to(world) as channel:
        if "x-dead-letter-exchange" in arguments:
            arguments["x-dead-letter-routing-key"] = f"{queue}.given-up"
            channel.queue_declare(f"{queue}.given-up", durable=True)
        channel.queue_declare(queue, durable=True, arguments=arguments)


def publish(world: World, prompt: str, queue: str, *, priority: int | None = None) -> Job:
    job = Job(str(uuid.uuid4()), world.next_generation_id)
    world.next_generation_id += 1
    fields = {"generation_id": job.generation_id, "prompt": prompt, "num_inference_steps": 8}
    body = json.dumps({"task_id": job.task_id, "data": fields}).encode()
    with channel_to(world) as channel:
        channel.basic_publish("", queue, body, pika.BasicProperties(delivery_mode=2, priority=priority), mandatory=True)
    return job


def start(world: World, **env: str) -> Worker:
    return start_light_worker(world, constants=CONSTANTS, SHUTDOWN_GRACE_SECONDS="1", **env)


def wait_until_held(world: World, job: Job, times: int) -> None:
    path = world.folder / "journal"
    eventually(lambda: path.read_text().count(f" held {job.task_id}") == times, world.workers[-1].log_tail)


def go_on(world: World, job: Job) -> None:
    (world.folder / f"go-{job.task_id}").touch()


def queues_of(worker: Worker, job: Job) -> list[str]:
    """Return the queue of each delivery that a run of the job began with."""
    return [line["queue"] for line in worker.events("job in") if line["task_id"] == job.task_id]


def wait_for(world: World, suffix: str, ready: int) -> None:
    eventually(lambda: world.queues()[suffix] == (ready, 0), lambda: str(world.queues()))


def test_a_job_returns_to_the_queue_it_came_from_with_its_priority_also_behind_a_killed_worker(world: World) -> None:
    # Given a job of the second queue whose worker is killed
    express = f"{world.queue}.express"
    weights = {"RABBITMQ_QUEUES": f"{express}:3,{world.queue}:1"}
    killed = start(world, **weights)
    job = publish(world, "hold@3 fault@4", express, priority=7)
    wait_until_held(world, job, 1)
    assert queues_of(killed, job) == [express]
    killed.kill()

    # When it fails in the next one, again and again
    worker = start(world, **weights)
    wait_until_held(world, job, 2)
    go_on(world, job)
    end = world.wait_for_end(job.generation_id)

    # Then each retry came by its own queue, and the letter knows where it was and how urgent
    assert end.body["error_code"] == "ENGINE_ERROR"
    assert queues_of(worker, job) == [f"{world.queue}.recover", *[express] * (MAX_ATTEMPTS - 1)]
    assert f".express.retry.{RETRY_SECONDS}" in world.queues()
    with channel_to(world) as channel:
        _, properties, _ = channel.basic_get(f"{world.queue}.dead", auto_ack=True)
    assert (properties.headers[QUEUE_HEADER], properties.priority) == (express, 7)
    world.wait_until_clean()


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"x-message-ttl": TTL_MS, "x-max-priority": 10}, id="classic", marks=long),
        pytest.param(LIMITED | {"x-message-ttl": TTL_MS}, id="quorum"),
    ],
)
def test_deployments_in_mid_job_lose_it_in_no_queue_and_count_in_none(world: World, arguments: dict[str, Any]) -> None:
    declare(world, world.queue, **arguments)
    declare(world, f"{world.queue}.as-old", **{"x-message-ttl": TTL_MS})
    start(world)
    job = publish(world, "hold@3", world.queue, priority=5)
    publish(world, "as old as the job", f"{world.queue}.as-old")
    wait_until_held(world, job, 1)
    wait_for(world, ".as-old", 0)  # so its time in the jobs' queue would be over

    # When more workers than crashes are allowed stop in the middle of it
    for number in (2, 3, 4):
        assert world.workers[-1].terminate() == 0
        wait_for(world, ".recover", 1)
        start(world)
        wait_until_held(world, job, number)

    go_on(world, job)
    assert world.wait_for_end(job.generation_id).kind == "complete"
    world.wait_until_clean()
    assert len(world.backend.ends(job.generation_id)) == 1


@pytest.mark.parametrize("kind", [{}, pytest.param(QUORUM, marks=long)], ids=["classic", "quorum"])
def test_a_deployment_while_the_queue_is_full_loses_no_job_in_hand(world: World, kind: dict[str, str]) -> None:
    """A queue that drops its oldest message at a length would drop what is requeued."""
    declare(world, world.queue, **kind, **{"x-max-length": 1})
    worker = start(world, MAX_CONCURRENT_GENERATIONS="1")
    jobs = []
    for number in range(1, 4):
        jobs.append(publish(world, "hold@3", world.queue))
        eventually(lambda: len(worker.events("job in")) == number, worker.log_tail)  # noqa: B023
    jobs.append(publish(world, "hold@3", world.queue))
    wait_until_held(world, jobs[0], 1)

    assert worker.terminate() == 0

    wait_for(world, ".recover", 3)
    assert world.queues()[""] == (1, 0)
    for job in jobs:
        go_on(world, job)
    start(world)
    for job in jobs:
        assert world.wait_for_end(job.generation_id).kind == "complete"
    world.wait_until_clean()


def test_a_killed_worker_s_job_survives_a_delivery_limit_of_one(world: World) -> None:
    """The first return is in the jobs' queue; from then on the job is in a queue whose limit is the worker's own."""
    declare(world, world.queue, **LIMITED)
    start(world)
    job = publish(world, "hold@3", world.queue)
    for number in (1, 2):
        wait_until_held(world, job, number)
        world.workers[-1].kill()
        start(world)
    wait_until_held(world, job, 3)

    go_on(world, job)
    assert world.wait_for_end(job.generation_id).kind == "complete"
    world.wait_until_clean()


def test_urgent_jobs_pass_those_that_wait_in_the_queue(world: World) -> None:
    """A classic queue sorts by priority from the first message on, a quorum queue of RabbitMQ 4 above 4 and below."""
    declare(world, world.queue, **{"x-max-priority": 10})
    worker = start(world, MAX_CONCURRENT_GENERATIONS="1")
    first = publish(world, "hold@3", world.queue)
    wait_until_held(world, first, 1)
    plain = [publish(world, "a fox", world.queue) for _ in range(6)]
    urgent = publish(world, "a fox", world.queue, priority=9)
    go_on(world, first)

    for job in (first, *plain, urgent):
        assert world.wait_for_end(job.generation_id).kind == "complete"
    order = [line["task_id"] for line in worker.events("job in")]
    # Two beside the one at work were taken before it came, so that their inputs were fetched
    assert order.index(urgent.task_id) <= 3
