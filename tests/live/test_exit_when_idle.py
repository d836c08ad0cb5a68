"""`darkroom run --exit-when-idle`: workers that drain a queue end with 0; what they do not take for idleness."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.station import Station, new_station, stand_in_env
from tests.support.world import HANG_SECONDS, Worker, World, eventually, new_world

NUM_JOBS = 12
NUM_WORKERS = 2
# Several times what an idle worker would have stayed.
STAYED_SECONDS = 2.5
CONSTANTS = {
    "worker.results.notifier:DELAYS_SECONDS": (0.2,),
    "worker.results.notifier:PATIENCE_SECONDS": 0.5,
    "worker.results.pacing:OWN_FAILURE_DELAYS_SECONDS": (0.2,),
}


@pytest.fixture
def world(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path: Path) -> Iterator[World]:
    with new_world(rabbitmq, s3_server, tmp_path) as made:
        yield made


@pytest.fixture
def station(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path: Path) -> Iterator[Station]:
    with new_station(rabbitmq, s3_server, tmp_path) as made:
        yield made


def wait_until_stayed(worker: Worker, reason: str) -> None:
    """Return once the worker has stayed for long with this reason for its GPU to be idle."""
    eventually(
        lambda: worker.metric("darkroom_idle_seconds_total", reason=reason) >= STAYED_SECONDS,
        worker.log_tail,
    )
    assert worker.process.poll() is None


def test_burst_is_drawn_by_workers_that_all_end_with_0(world: World) -> None:
    generation_ids = [world.publish(prompt="a red fox") for _ in range(NUM_JOBS)]

    env = stand_in_env(world.folder / "journal", {})
    workers = [world.start_worker("--exit-when-idle", "2", **env) for _ in range(NUM_WORKERS)]

    assert [worker.process.wait(HANG_SECONDS) for worker in workers] == [0] * NUM_WORKERS, workers[0].log_tail()
    ends = Counter((call.kind, call.generation_id) for call in world.backend.calls() if call.kind != "progress")
    assert ends == {("complete", generation_id): 1 for generation_id in generation_ids}
    begun = [line for line in (world.folder / "journal").read_text().splitlines() if " begin " in line]
    assert len(begun) == NUM_JOBS
    assert len(world.keys("generations/")) == NUM_JOBS
    world.wait_until_clean()


def test_worker_without_its_broker_or_with_an_end_to_tell_is_not_idle(station: Station) -> None:
    world = station.world
    station.broker.refuse()
    world.backend.answer("complete", 500)

    worker = world.start_worker("--exit-when-idle", "1", **station.env(constants=CONSTANTS))
    wait_until_stayed(worker, "broker_down")
    job = station.publish()
    station.broker.listen()
    wait_until_stayed(worker, "no_jobs")
    assert sum(world.queues()[".outbox"]) == 1

    world.backend.answer("complete", 200)
    assert worker.process.wait(HANG_SECONDS) == 0, worker.log_tail()
    station.assert_complete_once(job, num_posts=None)
