"""A worker, its engine, its broker, its store or its backend fails in the middle: every job still ends once.

What has a twin in `tests/live/test_faults_*.py`, whose engine runs without torch and holds on command, is shown here
with the real engine, which takes seconds to start and to draw: that is left to `make faults`.
"""

import json
import os
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pika
import pytest

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.station import new_station, start_light_worker
from tests.support.long import long
from tests.support.world import HANG_SECONDS, Worker, World, eventually, new_world
from worker.amqp.topology import QueueNames
from worker.jobs.disposition import MAX_RECOVERIES

LONG = 120  # steps: some seconds on one core, time enough to break something in the middle


@pytest.fixture
def world(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path: Path) -> Iterator[World]:
    with new_world(rabbitmq, s3_server, tmp_path) as made:
        yield made


@pytest.fixture
def worker(world: World) -> Worker:
    """Start a worker of the test's own, to be killed."""
    worker = world.start_worker()
    worker.wait_until_ready()
    return worker


@pytest.fixture(scope="module")
def lasting_world(
    rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    with new_world(rabbitmq, s3_server, tmp_path_factory.mktemp("world")) as made:
        made.start_worker().wait_until_ready()
        yield made


@pytest.fixture
def lasting_worker(lasting_world: World) -> Worker:
    """Start one worker for all tests after which it must be as good as new: starting one takes seven seconds."""
    worker = lasting_world.workers[0]
    eventually(lambda: worker.get("/health/ready")[0] == 200, worker.log_tail)
    lasting_world.wait_until_clean()
    return worker


class CountersSince:
    """What a lasting worker has counted and logged since a test began."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._steps = worker.metric("darkroom_denoise_lane_steps_total")
        self._lines = len(worker.log.read_text().splitlines())

    @property
    def num_steps(self) -> float:
        return self._worker.metric("darkroom_denoise_lane_steps_total") - self._steps

    def events(self, name: str) -> list[dict[str, Any]]:
        return self._worker.events(name, first_line=self._lines)


@pytest.fixture
def since(lasting_worker: Worker) -> CountersSince:
    return CountersSince(lasting_worker)


def assert_complete_once(world: World, generation_id: int) -> None:
    assert world.wait_for_end(generation_id).kind == "complete"
    world.wait_until_clean()
    assert len(world.backend.calls("complete", generation_id)) == 1
    assert world.backend.calls("failed", generation_id) == []
    assert world.image(generation_id).size == (128, 128)


@long
def test_killed_engine_costs_its_job_a_second_run_and_nothing_else(
    lasting_world: World, lasting_worker: Worker, since: CountersSince
) -> None:
    world, worker = lasting_world, lasting_worker
    first = world.publish(num_inference_steps=LONG)
    second = world.publish()
    world.wait_for_step(first)

    os.kill(worker.engine_pid(), signal.SIGKILL)

    assert_complete_once(world, first)
    assert_complete_once(world, second)
    assert len(since.events("engine crashed")) == 1
    assert worker.metric("darkroom_engine_restarts_total") >= 1
    percentages = [call.body["progress"]["progress_percent"] for call in world.backend.calls("progress", first)]
    assert percentages == sorted(set(percentages))


@long
def test_a_job_that_kills_the_engine_every_time_fails_alone(lasting_world: World, lasting_worker: Worker) -> None:
    world, worker = lasting_world, lasting_worker
    poison = world.publish(num_inference_steps=LONG)
    innocent = world.publish()

    world.wait_for_step(poison)
    killed = worker.engine_pid()
    os.kill(killed, signal.SIGSEGV)
    eventually(lambda: worker.get("/health/ready")[0] == 200 and worker.engine_pid() != killed)
    time.sleep(0.5)
    os.kill(worker.engine_pid(), signal.SIGSEGV)

    end = world.wait_for_end(poison)
    assert (end.kind, end.body["error_code"]) == ("failed", "ENGINE_CRASHED")
    assert world.wait_for_end(innocent).kind == "complete"
    world.wait_until_clean(dead=1)
    assert "ENGINE_CRASHED" in world.dead_letters()[0][1]


def is_given_back(channel: Any, queue: str) -> bool:
    """Return whether a message was ready and is given back, as one that a killed worker had."""
    method, _, _ = channel.basic_get(queue)
    if method is not None:
        channel.basic_reject(method.delivery_tag, requeue=True)  # RabbitMQ 4.3 does not count a nack
    return method is not None


def test_a_job_that_eleven_workers_were_killed_with_is_tried_no_more(world: World) -> None:
    """The broker's own count of deliveries, which is all that outlives a supervisor."""
    names = QueueNames(world.queue)
    body = json.dumps({"task_id": str(uuid.uuid4()), "data": {"generation_id": 1, "prompt": "a fox"}}).encode()
    with pika.BlockingConnection(pika.URLParameters(world.rabbitmq.url)) as connection:
        channel = connection.channel()
        channel.queue_declare(names.recover, durable=True, arguments=names.arguments[names.recover])
        channel.basic_publish("", names.recover, body, pika.BasicProperties(delivery_mode=2))
        for _ in range(MAX_RECOVERIES + 1):
            eventually(lambda: is_given_back(channel, names.recover))

    start_light_worker(world)

    end = world.wait_for_end(1)
    assert (end.kind, end.body["error_code"]) == ("failed", "WORKER_CRASHED")
    world.wait_until_clean(dead=1)


@long
def test_a_killed_worker_leaves_its_job_to_the_next_one(world: World, worker: Worker) -> None:
    generation_id = world.publish(num_inference_steps=LONG)
    world.wait_for_step(generation_id)
    engine = worker.engine_pid()
    # An engine that hangs sees no closed pipe: the kernel must end it with its parent.
    os.kill(engine, signal.SIGSTOP)

    worker.kill()
    eventually(lambda: not Path(f"/proc/{engine}").exists())
    next_worker = world.start_worker()
    next_worker.wait_until_ready()

    assert_complete_once(world, generation_id)
    assert [line["queue"] for line in next_worker.events("job in")] == [f"{world.queue}.recover"]


@long
def test_sigterm_lets_the_running_job_end_and_gives_the_waiting_ones_back(world: World) -> None:
    worker = world.start_worker(MAX_CONCURRENT_GENERATIONS="1")
    worker.wait_until_ready()
    running = world.publish(num_inference_steps=LONG)
    world.wait_for_step(running)
    waiting = world.publish()
    eventually(lambda: len(worker.events("job in")) == 2)

    exit_code = worker.terminate()

    assert exit_code == 0
    assert [end.kind for end in world.backend.ends(running)] == ["complete"]
    assert world.backend.calls(generation_id=waiting) == []
    eventually(lambda: world.queues()[".recover"] == (1, 0), lambda: str(world.queues()))
    world.start_worker().wait_until_ready()
    assert_complete_once(world, waiting)


@long
def test_sigterm_with_a_job_longer_than_the_grace_period_gives_it_back(world: World) -> None:
    worker = world.start_worker(SHUTDOWN_GRACE_SECONDS="6")
    worker.wait_until_ready()
    generation_id = world.publish(num_inference_steps=150, num_images=8)
    world.wait_for_step(generation_id)

    started_at = time.monotonic()
    exit_code = worker.terminate()

    assert exit_code == 0
    assert time.monotonic() - started_at < 60
    assert world.backend.ends(generation_id) == []
    eventually(lambda: sum(sum(counts) for counts in world.queues().values()) == 1, lambda: str(world.queues()))


def test_sigterm_while_the_model_is_loading_ends_at_once(world: World) -> None:
    worker = world.start_worker()
    eventually(lambda: worker.get("/health/live")[0] == 200)
    assert worker.get("/health/ready")[0] == 503

    assert worker.terminate() == 0
    assert worker.events("engine ready") == []


@long
def test_a_second_signal_ends_at_once(world: World, worker: Worker) -> None:
    generation_id = world.publish(num_inference_steps=150, num_images=8)
    world.wait_for_step(generation_id)
    engine = worker.engine_pid()

    worker.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    worker.process.send_signal(signal.SIGTERM)

    assert worker.process.wait(60) == 130
    eventually(lambda: not Path(f"/proc/{engine}").exists())


@long
def test_jobs_go_on_while_the_backend_is_down_and_each_end_arrives_later(
    lasting_world: World, lasting_worker: Worker, since: CountersSince
) -> None:
    world, worker = lasting_world, lasting_worker
    world.backend.stop()
    generation_ids = [world.publish(num_inference_steps=8) for _ in range(4)]

    keys = {f"generations/gen-{generation_id}.png" for generation_id in generation_ids}
    eventually(lambda: keys <= set(world.keys("generations/")), worker.log_tail)
    eventually(lambda: sum(world.queues()[".outbox"]) == 4, lambda: str(world.queues()))
    world.wait_for_depth(0, 0)

    world.backend.start()

    for generation_id in generation_ids:
        assert_complete_once(world, generation_id)
    assert since.num_steps == 4 * 8


@long
def test_events_in_the_outbox_outlive_the_worker_that_put_them_there(world: World) -> None:
    worker = start_light_worker(world, constants={"worker.results.notifier:PATIENCE_SECONDS": 1.0})
    world.backend.stop()
    generation_id = world.publish()
    eventually(lambda: sum(world.queues().get(".outbox", (0,))) == 1)
    worker.kill()

    world.backend.start()
    next_worker = start_light_worker(world)

    assert_complete_once(world, generation_id)
    assert next_worker.metric("darkroom_denoise_lane_steps_total") == 0


@long
def test_a_backend_that_refuses_the_event_for_good_leaves_a_dead_letter(
    lasting_world: World, lasting_worker: Worker, since: CountersSince
) -> None:
    world = lasting_world
    world.backend.answer("complete", 410, times=1)

    generation_id = world.publish()
    eventually(lambda: len(since.events("job out")) == 1)
    world.wait_until_clean(dead=1)

    assert len(world.backend.calls("complete", generation_id)) == 1
    body, reason = world.dead_letters()[0]
    assert b"result_url" in body
    assert "410" in reason


@long
def test_a_server_error_is_tried_again_under_the_same_webhook_id(
    lasting_world: World, lasting_worker: Worker, since: CountersSince
) -> None:
    world = lasting_world
    world.backend.answer("complete", 500, times=2)

    generation_id = world.publish()

    assert world.wait_for_end(generation_id).kind == "complete"
    calls = world.backend.calls("complete", generation_id)
    assert [call.status for call in calls] == [500, 500, 200]
    assert len({call.headers["webhook-id"] for call in calls}) == 1
    assert since.num_steps == 8
    world.wait_until_clean()


@long
def test_a_connection_closed_in_mid_job_is_adopted_and_nothing_runs_twice(
    lasting_world: World, lasting_worker: Worker, since: CountersSince
) -> None:
    world = lasting_world
    generation_id = world.publish(num_inference_steps=LONG)
    world.queues()  # opens the console, which takes a second
    world.wait_for_step(generation_id)

    world.rabbitmq.close_connections()

    assert_complete_once(world, generation_id)
    assert since.num_steps == LONG
    assert len(since.events("delivery adopted")) == 1


@long
def test_heartbeats_flow_through_a_job_longer_than_the_broker_would_wait(world: World) -> None:
    # Given a broker that gives a silent peer up after three heartbeats of two seconds
    worker = world.start_worker(RABBITMQ_HEARTBEAT_SECONDS="2")
    worker.wait_until_ready()

    # When a job keeps the engine busy for longer than that
    generation_id = world.publish(num_inference_steps=150, num_images=3)
    assert_complete_once(world, generation_id)

    # Then the connection was never lost
    eventually(lambda: len(worker.events("job out")) == 1, worker.log_tail)  # behind the ack
    assert worker.events("job out")[0]["stages"]["denoise"] > 6
    assert len(worker.events("consuming")) == 1
    assert worker.events("broker connection lost") == []


@long
def test_a_broker_restarted_in_mid_job_changes_nothing_for_the_backend(
    lasting_world: World, lasting_worker: Worker, since: CountersSince
) -> None:
    world = lasting_world
    generation_id = world.publish(num_inference_steps=150)
    world.wait_for_step(generation_id)

    world.rabbitmq.kill()
    world.rabbitmq.start()

    assert_complete_once(world, generation_id)
    assert since.num_steps == 150
    assert world.wait_for_end(world.publish()).kind == "complete"


@long
def test_a_deleted_queue_is_declared_again_and_consumed(
    lasting_world: World, lasting_worker: Worker, since: CountersSince
) -> None:
    world, worker = lasting_world, lasting_worker
    world.wait_for_end(world.publish())

    world.rabbitmq.ctl("delete_queue", world.queue)

    eventually(lambda: len(since.events("consuming")) == 1, worker.log_tail)
    assert_complete_once(world, world.publish())


@long
def test_job_waits_in_the_retry_queue_while_the_store_is_down(
    lasting_world: World, lasting_worker: Worker, since: CountersSince
) -> None:
    world, worker = lasting_world, lasting_worker
    world.store.stop()
    try:
        generation_id = world.publish()
        eventually(lambda: world.queues().get(".retry.30") == (1, 0), worker.log_tail)
        assert world.backend.ends(generation_id) == []
    finally:
        world.store.start()

    assert_complete_once(world, generation_id)
    assert [line["attempt"] for line in since.events("job in")] == [1, 2]


@long
def test_a_record_in_the_ledger_wins_over_a_second_worker(world: World, worker: Worker) -> None:
    task_id = str(uuid.uuid4())
    first = world.publish(task_id=task_id)
    world.wait_for_end(first)
    world.wait_until_clean()
    worker.kill()

    second_worker = world.start_worker()
    second_worker.wait_until_ready()
    world.publish(task_id=task_id, generation_id=first)
    world.wait_until_clean()

    assert len(world.backend.calls("complete", first)) == 1
    assert second_worker.metric("darkroom_denoise_lane_steps_total") == 0
    assert world.backend.calls("failed") == []


@long
def test_a_model_that_cannot_be_loaded_ends_the_worker_before_it_takes_a_job(world: World, tmp_path: Path) -> None:
    world.publish()

    worker = world.start_worker(MODEL_ID=str(tmp_path))

    assert worker.process.wait(HANG_SECONDS) == 3
    assert "model_index.json" in worker.log_tail()
    world.wait_for_depth(1, 0)
    assert world.backend.calls() == []


def test_a_broker_that_is_down_at_the_start_is_waited_for(
    rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path: Path
) -> None:
    with new_station(rabbitmq, s3_server, tmp_path) as station:
        world = station.world
        station.broker.refuse()
        worker = world.start_worker(**station.env())
        eventually(lambda: worker.get("/health/live")[0] == 200)
        eventually(lambda: "broker" in worker.get("/health/ready")[1], worker.log_tail)

        station.broker.listen()

        worker.wait_until_ready()
        assert_complete_once(world, world.publish())
