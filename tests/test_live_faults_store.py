"""The way to the store breaks in the middle of a request or an answer: every object is whole, every job ends once."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.proxy import DOWN, Link, Sign
from tests.faults.station import DONE, Job, Station, answers, long, new_station
from tests.world import Worker, eventually

pytestmark = long  # `make faults` runs them

CONSTANTS = {
    "worker.settling:RETRY_DELAYS_SECONDS": [1, 1],
    "worker.settling:MAX_ATTEMPTS": 3,
    "worker.story:PICTURE_PATIENCE_SECONDS": 0.0,
    "clients.storage:CALL_DEADLINE_SECONDS": 2.0,
}
SLOW_DOWN = b"<Error><Code>SlowDown</Code></Error>"
HALF = 30_000  # bytes, about: a picture of 128 pixels squared is noise, and 49 kB of PNG


@pytest.fixture(scope="module")
def station(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Station]:
    with new_station(rabbitmq, s3_server, tmp_path_factory.mktemp("station")) as made:
        made.start_worker(constants=CONSTANTS, CACHE_DIR=str(cache_of(made)))
        yield made


@pytest.fixture(autouse=True)
def worker(station: Station) -> Worker:
    """One worker for all tests, after each of which it must be as good as new."""
    station.make_sound()
    worker = station.world.workers[0]
    eventually(lambda: worker.get("/health/ready")[0] == 200, 30, worker.log_tail)
    station.world.wait_until_clean()
    return worker


def cache_of(station: Station) -> Path:
    return station.world.folder / "cache"


def num_retried(worker: Worker) -> float:
    return worker.metric("darkroom_jobs_total", outcome="retried")


def adapter(station: Station, name: str, num_bytes: int = 100_000) -> str:
    """An adapter in the bucket, which the engine's stand-in never reads."""
    return station.world.upload(f"models/{name}.safetensors", b"x" * num_bytes)


def put_of_picture(station: Station, job: Job) -> Sign:
    return station.put_of_picture(job)


def put_of_record(station: Station, job: Job) -> Sign:
    return station.put_of_record(job)


@pytest.mark.parametrize("put", [put_of_picture, put_of_record])
def test_a_busy_store_is_asked_again_and_nobody_hears_of_it(
    station: Station, put: Callable[[Station, Job], Sign]
) -> None:
    job = station.publish_held()
    refused = station.store.when(put(station, job), do=answers(503, SLOW_DOWN), times=2)
    station.release(job)

    station.assert_complete_once(job)
    assert refused.num_fired == 2


@pytest.mark.parametrize("put", [put_of_picture, put_of_record])
def test_a_write_whose_answer_is_lost_is_one_write_and_one_end(
    station: Station, put: Callable[[Station, Job], Sign]
) -> None:
    job = station.publish_held()
    lost = station.store.when(put(station, job), DONE, do=Link.reset)
    station.release(job)

    station.assert_complete_once(job)
    assert lost.num_fired == 1


def test_a_picture_cut_in_the_middle_of_its_way_is_sent_again_whole(station: Station) -> None:
    job = station.publish_held()
    cut = station.store.when(station.put_of_picture(job), do=Link.reset, after_bytes=HALF)
    station.release(job)

    station.assert_complete_once(job)
    assert cut.num_fired == 1
    assert multipart_uploads(station) == []


def multipart_uploads(station: Station) -> list[object]:
    found = station.world.store.client().list_multipart_uploads(Bucket=station.world.bucket)
    return list(found.get("Uploads", ()))


def test_an_adapter_cut_in_the_middle_of_its_way_is_fetched_again(station: Station, worker: Worker) -> None:
    path = adapter(station, "cut")
    cut = station.store.when(station.sign("GET", "models/cut.safetensors"), DONE, do=Link.close, after_bytes=HALF)

    retried_before = num_retried(worker)
    station.assert_complete_once(station.publish(lora_path=path))

    assert cut.num_fired == 1
    assert num_retried(worker) == retried_before
    assert 100_000 in [file.stat().st_size for file in cache_of(station).iterdir()]
    assert list(cache_of(station).glob("*.part")) == []


def test_an_adapter_with_a_wrong_byte_is_fetched_again_and_never_used(station: Station, worker: Worker) -> None:
    path = adapter(station, "wrong")
    wrong = b"y" * 100_000
    etag = station.world.store.client().head_object(Bucket=station.world.bucket, Key="models/wrong.safetensors")["ETag"]
    given = station.store.when(
        station.sign("GET", "models/wrong.safetensors"), do=answers(200, wrong, ETag=etag), times=1
    )

    retried_before = num_retried(worker)
    station.assert_complete_once(station.publish(lora_path=path))

    assert given.num_fired == 1
    assert num_retried(worker) == retried_before
    assert all(wrong != file.read_bytes() for file in cache_of(station).iterdir())


def test_a_store_that_fails_one_job_for_ever_fails_it_once_and_no_other(station: Station) -> None:
    world = station.world
    doomed = station.publish_held()
    station.store.when(station.put_of_picture(doomed), do=answers(500), times=None)
    station.release(doomed)

    # While that one goes round, others are drawn.
    eventually(lambda: world.queues().get(".retry.1") == (1, 0), 20, world.workers[0].log_tail)
    other = station.publish()
    assert world.wait_for_end(other.generation_id, 5).kind == "complete"
    station.assert_failed_once(doomed, "STORAGE_UNAVAILABLE")

    world.wait_until_clean(dead=1)
    assert "STORAGE_UNAVAILABLE" in world.dead_letters()[0][1]
    assert station.num_runs(doomed) == 3
    assert station.object_of(doomed) not in world.keys("generations/")
    assert world.backend.ends(doomed.generation_id)[0].body["retry_count"] == 2


def test_a_store_that_hangs_is_given_up_in_time_and_the_job_tried_again(station: Station) -> None:
    job = station.publish_held()
    station.store.black_hole()
    station.release(job)
    eventually(lambda: station.world.queues().get(".retry.1") == (1, 0), 10, station.world.workers[0].log_tail)
    station.store.pass_on()

    station.assert_complete_once(job, num_runs=2)


def test_a_slow_store_costs_time_and_nothing_else(station: Station) -> None:
    station.store.delay(0.1)

    station.assert_complete_once(station.publish(lora_path=adapter(station, "slow")))


def test_an_answer_that_drips_ends_with_the_call(station: Station) -> None:
    job = station.publish_held()
    station.store.drip(0.2, DOWN)
    station.release(job)
    eventually(lambda: station.world.queues().get(".retry.1") == (1, 0), 10, station.world.workers[0].log_tail)
    station.store.pass_on()

    station.assert_complete_once(job, num_runs=2)
