"""Two workers on one queue: they share its jobs, and stopping one loses none. Their engines run without torch."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.station import start_light_worker
from tests.support.world import Worker, World, eventually, new_world

NUM_JOBS = 40
NUM_JOBS_TO_STOP = 24
EVEN_SHARE = NUM_JOBS / 2
UNEVENNESS = 0.2  # of the even share
STEPS, STEP_SECONDS = 8, 0.05


@pytest.fixture(scope="module")
def world(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder: Path = tmp_path_factory.mktemp("sharing")
    with new_world(rabbitmq, s3_server, folder) as made:
        yield made


@pytest.fixture(scope="module")
def pair(world: World) -> tuple[Worker, Worker]:
    step = {"tests.support.engine.fake_child:TURN_SECONDS": STEP_SECONDS}
    # By default all workers of a user on a host have one.
    cache = str(world.folder / "cache")
    return (
        start_light_worker(world, constants=step, CACHE_DIR=cache),
        start_light_worker(world, constants=step, CACHE_DIR=cache),
    )


def num_complete(worker: Worker) -> int:
    return int(worker.metric("darkroom_jobs_total", outcome="complete"))


def test_two_workers_share_forty_jobs_within_a_fifth_of_evenly(world: World, pair: tuple[Worker, Worker]) -> None:
    style = world.upload("models/style.safetensors", b"weights")
    ids = [world.publish(num_inference_steps=STEPS, lora_path=style) for _ in range(NUM_JOBS)]

    assert {world.wait_for_end(generation_id).kind for generation_id in ids} == {"complete"}
    world.wait_until_clean()
    caches = (world.folder / "cache", world.folder / "cache" / "worker-2")
    assert [len(list(folder.glob("*.safetensors"))) for folder in caches] == [1, 1]
    shares = [num_complete(worker) for worker in pair]
    assert sum(shares) == NUM_JOBS
    assert all(abs(share - EVEN_SHARE) <= UNEVENNESS * EVEN_SHARE for share in shares), shares


def test_stopping_one_of_two_loses_nothing_and_repeats_nothing(world: World, pair: tuple[Worker, Worker]) -> None:
    leaving, staying = pair
    before = [num_complete(worker) for worker in pair]
    ids = [world.publish(num_inference_steps=3 * STEPS) for _ in range(NUM_JOBS_TO_STOP)]
    eventually(lambda: num_complete(leaving) > before[0], leaving.log_tail)

    assert leaving.terminate() == 0

    assert {world.wait_for_end(generation_id).kind for generation_id in ids} == {"complete"}
    world.wait_until_clean()
    assert all(len(world.backend.calls("complete", generation_id)) == 1 for generation_id in ids)
    assert 0 < num_complete(staying) - before[1] < NUM_JOBS_TO_STOP
