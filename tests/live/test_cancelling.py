"""Cancel orders on the fanout exchange, through a whole worker whose engine runs without torch.

With the real engine: `tests/live/drawing/test_batching.py`.
"""

import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pika
import pytest

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.station import start_light_worker
from tests.hostile.raw_properties import FROM_THE_FIELD, Raw
from tests.support.world import Worker, World, eventually, new_world

LONG = 150  # steps: three seconds
STEP_SECONDS = 0.02
# One lane and two jobs fetched ahead: with more than three jobs, some still wait in the queue.
NUM_AHEAD = 3
JOB_SECONDS = "darkroom_job_seconds_sum"


@pytest.fixture(scope="module")
def world(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with new_world(rabbitmq, s3_server, tmp_path_factory.mktemp("world")) as made:
        start_light_worker(
            made,
            constants={"tests.support.engine.fake_child:TURN_SECONDS": STEP_SECONDS},
            MAX_CONCURRENT_GENERATIONS="1",
        )
        yield made


@pytest.fixture
def worker(world: World) -> Worker:
    return world.workers[0]


def cancel(world: World, *, properties: Any = None, **order: object) -> None:
    connection = pika.BlockingConnection(pika.URLParameters(world.rabbitmq.url))
    connection.channel().basic_publish(f"{world.queue}.cancel", "", json.dumps(order).encode(), properties)
    connection.close()


def assert_cancelled_once(world: World, generation_id: int) -> None:
    end = world.wait_for_end(generation_id)
    assert (end.kind, end.body["error_code"]) == ("failed", "CANCELLED")
    assert world.backend.calls("complete", generation_id) == []
    assert len(world.backend.calls("failed", generation_id)) == 1


def num_ends(worker: Worker) -> dict[str, float]:
    return {outcome: worker.metric("darkroom_jobs_total", outcome=outcome) for outcome in ("failed", "cancelled")}


def test_a_running_job_leaves_within_two_steps_and_the_next_one_begins(world: World, worker: Worker) -> None:
    steps_before = worker.metric("darkroom_denoise_lane_steps_total")
    task_id = str(uuid.uuid4())
    running = world.publish(task_id=task_id, num_inference_steps=LONG)
    next_one = world.publish()
    world.wait_for_step(running)

    cancel(world, task_id=task_id)

    assert_cancelled_once(world, running)
    assert world.wait_for_end(next_one).kind == "complete"
    assert worker.metric("darkroom_denoise_lane_steps_total") - steps_before < LONG
    world.wait_until_clean()


def test_cancelled_job_is_not_counted_as_failed_and_keeps_its_seconds(world: World, worker: Worker) -> None:
    seconds_before, ends_before = worker.metric(JOB_SECONDS), num_ends(worker)
    running = world.publish(num_inference_steps=LONG)
    world.wait_for_step(running)
    # A quarter of its steps are done, each of which takes so long at least.
    denoised_seconds = 0.9 * LONG / 4 * STEP_SECONDS

    cancel(world, generation_id=running)

    assert_cancelled_once(world, running)
    eventually(lambda: any(one["generation_id"] == running for one in worker.events("job out")))
    (line,) = (one for one in worker.events("job out") if one["generation_id"] == running)
    ended = json.loads(worker.get("/status.json")[1])["last_jobs"]
    (row,) = (one for one in ended if one["generation_id"] == str(running))
    assert (line["outcome"], row["outcome"]) == ("cancelled", "cancelled")
    assert line["seconds"] > denoised_seconds
    assert row["seconds"] == pytest.approx(line["seconds"], abs=0.1)
    assert line["stages"]["denoise"] >= denoised_seconds
    # Nearly all of it is accounted to a stage.
    assert sum(line["stages"].values()) == pytest.approx(line["seconds"], abs=0.5)
    assert worker.metric(JOB_SECONDS) - seconds_before == pytest.approx(line["seconds"], abs=0.01)
    assert num_ends(worker) == ends_before | {"cancelled": ends_before["cancelled"] + 1}


def test_jobs_that_wait_here_or_still_in_the_queue_never_reach_the_gpu(world: World, worker: Worker) -> None:
    steps_before = worker.metric("darkroom_denoise_lane_steps_total")
    task_id = str(uuid.uuid4())
    running = world.publish(task_id=task_id, prompt=f"hold@{LONG}", num_inference_steps=LONG)
    world.wait_for_step(running)
    waiting = [world.publish() for _ in range(NUM_AHEAD + 2)]
    eventually(lambda: world.queues()[""] == (3, NUM_AHEAD), lambda: str(world.queues()))

    for generation_id in (waiting[0], waiting[-1]):
        cancel(world, generation_id=generation_id)

    assert_cancelled_once(world, waiting[0])
    (world.folder / f"go-{task_id}").touch()
    assert_cancelled_once(world, waiting[-1])
    for generation_id in (running, *waiting[1:-1]):
        assert world.wait_for_end(generation_id).kind == "complete"
    world.wait_until_clean()
    # A turn is counted behind its answers.
    steps = steps_before + LONG + 8 * NUM_AHEAD
    eventually(lambda: worker.metric("darkroom_denoise_lane_steps_total") == steps)


def test_a_new_try_of_a_cancelled_generation_is_drawn(world: World) -> None:
    first = world.publish(num_inference_steps=LONG)
    world.wait_for_step(first)
    cancel(world, generation_id=first)
    world.wait_for_end(first)

    message = {
        "task_id": str(uuid.uuid4()),
        "data": {"generation_id": first, "prompt": "an owl", "num_inference_steps": 8},
        "created_at": datetime.now(UTC).isoformat(),
    }
    world.publish_raw(json.dumps(message).encode())

    eventually(lambda: len(world.backend.ends(first)) == 2)
    assert [end.kind for end in world.backend.ends(first)] == ["failed", "complete"]


def test_unreadable_cancel_order_is_ignored_and_the_next_is_obeyed(world: World, worker: Worker) -> None:
    cancel(world, task_id="nonsense")
    eventually(lambda: len(worker.events("cancel order ignored")) == 1)

    generation_id = world.publish(num_inference_steps=LONG)
    world.wait_for_step(generation_id)
    cancel(world, generation_id=generation_id)

    assert_cancelled_once(world, generation_id)


@pytest.mark.parametrize("name", FROM_THE_FIELD)
def test_cancel_order_is_obeyed_whatever_its_headers(world: World, worker: Worker, name: str) -> None:
    num_lost = len(worker.events("broker connection lost"))
    generation_id = world.publish(num_inference_steps=LONG)
    world.wait_for_step(generation_id)

    cancel(world, properties=Raw(FROM_THE_FIELD[name]), generation_id=generation_id)

    assert_cancelled_once(world, generation_id)
    assert len(worker.events("broker connection lost")) == num_lost
