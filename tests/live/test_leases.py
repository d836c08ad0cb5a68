"""Jobs longer than the broker waits for an ack: one run, one end, and another worker's where theirs is gone."""

import json
import os
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pika
import pytest

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.station import SITE, start_light_worker
from tests.support.long import long
from tests.support.paths import ROOT
from tests.support.servers.broker_admin import wait_for_acks
from tests.support.world import HANG_SECONDS, World, eventually, new_world
from worker.amqp.delivery import LEASE_HEADER
from worker.messages.identity import own_task_id

CONSUMER_TIMEOUT_SECONDS = 6
LONG = {"num_inference_steps": 150, "num_images": 4}  # some 15 seconds on one core
LONG_LANE_STEPS = 600


@pytest.fixture
def world(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path: Path) -> Iterator[World]:
    """Start a world whose broker waits no more than six seconds for an ack, and checks each second."""
    wait_for_acks(rabbitmq, CONSUMER_TIMEOUT_SECONDS, 1)
    with new_world(rabbitmq, s3_server, tmp_path) as made:
        yield made
    wait_for_acks(rabbitmq, 1800, 60)


@long
def test_a_job_longer_than_the_broker_waits_runs_once_beside_another_worker(world: World) -> None:
    env = {
        "RABBITMQ_CONSUMER_TIMEOUT_SECONDS": str(CONSUMER_TIMEOUT_SECONDS),
        "MAX_CONCURRENT_GENERATIONS": "1",
        # A note that holds for as long as the broker waits: a tenth of six seconds is less than a busy machine may lose
        "PYTHONPATH": f"{SITE}{os.pathsep}{ROOT}",
        "FAULTS_CONSTANTS": json.dumps({"worker.jobs.leases:VALID_SHARE": 1.0}),
    }
    workers = [world.start_worker(**env) for _ in range(2)]
    for worker in workers:
        worker.wait_until_ready()

    started_at = time.monotonic()
    generation_id = world.publish(**LONG)

    assert world.wait_for_end(generation_id).kind == "complete"
    assert time.monotonic() - started_at > 2 * CONSUMER_TIMEOUT_SECONDS, "too short to tell"
    # The last copy comes back, finds the end and goes.
    world.wait_until_clean()
    assert len(world.backend.calls("complete", generation_id)) == 1
    assert sum(worker.metric("darkroom_denoise_lane_steps_total") for worker in workers) == LONG_LANE_STEPS
    assert not any(worker.events("broker connection lost") for worker in workers)


def test_lease_is_kept_while_a_worker_that_stops_waits_for_its_job(world: World) -> None:
    """One that ran out would count as a crash, and have the job drawn by another worker beside this one."""
    task_id, folder = str(uuid.uuid4()), str(world.folder)
    timeout = str(CONSUMER_TIMEOUT_SECONDS)
    worker = start_light_worker(
        world, RABBITMQ_CONSUMER_TIMEOUT_SECONDS=timeout, SHUTDOWN_GRACE_SECONDS="40", FAULTS_FOLDER=folder
    )
    generation_id = world.publish(task_id=task_id, prompt="hold@3")
    eventually(lambda: bool(worker.events("on lease")), worker.log_tail)

    worker.process.send_signal(signal.SIGTERM)
    eventually(lambda: bool(worker.events("stopping")), worker.log_tail)
    key, stopped_at = f"jobs/{task_id}.lease", time.time()
    eventually(lambda: noted_until(world, key) > stopped_at + CONSUMER_TIMEOUT_SECONDS / 2, worker.log_tail)
    (world.folder / f"go-{task_id}").touch()

    assert worker.process.wait(HANG_SECONDS) == 0
    assert world.wait_for_end(generation_id).kind == "complete"
    assert world.keys(key) == []


def noted_until(world: World, key: str) -> float:
    note = world.store.client().get_object(Bucket=world.bucket, Key=key)["Body"].read()
    return float(json.loads(note)["until"])


def test_a_copy_waits_while_its_job_is_at_work_elsewhere_and_is_done_once_that_worker_is_gone(world: World) -> None:
    """What a killed worker leaves: a copy in the broker, and a note in the bucket that is renewed no more. The second
    job's task id was another generation's, so that its worker gave it an id of its own."""
    start_light_worker(world, RABBITMQ_CONSUMER_TIMEOUT_SECONDS=str(CONSUMER_TIMEOUT_SECONDS))
    task_ids = [str(uuid.uuid4()), str(uuid.uuid4())]
    held_until = time.time() + 3
    for noted in (task_ids[0], own_task_id(task_ids[1], 2)):
        world.upload(f"jobs/{noted}.lease", json.dumps({"until": held_until}).encode())

    with pika.BlockingConnection(pika.URLParameters(world.rabbitmq.url)) as connection:
        properties = pika.BasicProperties(delivery_mode=2, headers={LEASE_HEADER: 1})
        for number, task_id in enumerate(task_ids, start=1):
            data = {"generation_id": number, "prompt": "a fox", "num_inference_steps": 8}
            body = json.dumps({"task_id": task_id, "data": data}).encode()
            connection.channel().basic_publish("", f"{world.queue}.recover", body, properties)

    for number in (1, 2):
        end = world.wait_for_end(number)
        assert end.kind == "complete"
        assert end.received_at > held_until
        assert world.backend.calls(generation_id=number)[0].received_at > held_until
    world.wait_until_clean()


@long
def test_a_lost_connection_of_one_of_two_workers_costs_no_second_run(
    rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path: Path
) -> None:
    """The broker gives what was in its hands to the other worker, which finds that it is still at work."""
    with new_world(rabbitmq, s3_server, tmp_path) as world:
        workers = [world.start_worker(MAX_CONCURRENT_GENERATIONS="2") for _ in range(2)]
        for worker in workers:
            worker.wait_until_ready()
        jobs = [world.publish(num_inference_steps=120) for _ in range(4)]
        for generation_id in jobs:
            world.wait_for_step(generation_id)

        rabbitmq.close_connections()

        for generation_id in jobs:
            assert world.wait_for_end(generation_id).kind == "complete"
        world.wait_until_clean()
        assert all(len(world.backend.calls("complete", generation_id)) == 1 for generation_id in jobs)
        assert sum(worker.metric("darkroom_denoise_lane_steps_total") for worker in workers) == 4 * 120
