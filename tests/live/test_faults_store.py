"""The way to the store breaks in the middle of a request or an answer: every object is whole, every job ends once."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.proxy import DOWN, UP, Link, Proxy, Sign
from tests.faults.station import DONE, Job, Station, answers, new_station
from tests.support.long import long
from tests.support.world import HANG_SECONDS, Worker, eventually

CONSTANTS = {
    "worker.amqp.topology:RETRY_DELAYS_SECONDS": [1, 1],
    "worker.jobs.disposition:MAX_ATTEMPTS": 3,
    "worker.results.image_store:IMAGE_PATIENCE_SECONDS": 0.0,
    "worker.jobs.inputs.store_source:NOT_FOUND_RETRY_SECONDS": 0.5,
    "worker.jobs.inputs.slow_fetches:SLOW_AFTER_SECONDS": 1.0,
    # After `SlowDown` boto3's pauses are of up to one and two seconds.
    "clients.storage.client:CALL_DEADLINE_SECONDS": 4.0,
    "clients.storage.download:RATE_WINDOW_SECONDS": 0.5,
}
HALF = 30_000  # bytes, about: a picture of 128 pixels squared is noise, and 49 kB of PNG
NUM_PLACES = 12  # ten lanes, and two jobs more whose adapters are fetched while others are drawn
PAUSE_SECONDS = 0.3  # in which a worker that refuses jobs has stopped to take them


@pytest.fixture(scope="module")
def station(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Station]:
    with new_station(rabbitmq, s3_server, tmp_path_factory.mktemp("station")) as made:
        yield made


@pytest.fixture(autouse=True)
def worker(station: Station) -> Worker:
    """Start one worker for all tests, after each of which it must be as good as new or gone."""
    station.make_sound()
    alive = [one for one in station.world.workers if one.process.poll() is None]
    worker = alive[0] if alive else start_worker(station)
    eventually(lambda: worker.get("/health/ready")[0] == 200, worker.log_tail)
    station.world.wait_until_clean()
    return worker


def start_worker(station: Station) -> Worker:
    return station.start_worker(constants=CONSTANTS, CACHE_DIR=str(cache_of(station)))


def cache_of(station: Station) -> Path:
    return station.world.folder / "cache"


def error(code: str) -> bytes:
    """Build the body of an error answer of the store."""
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()


def wait_for_retry(worker: Worker, num_before: float) -> None:
    eventually(lambda: num_retried(worker) > num_before, worker.log_tail)


def num_retried(worker: Worker) -> float:
    return worker.metric("darkroom_jobs_total", outcome="retried")


def adapter(station: Station, name: str, num_bytes: int = 100_000) -> str:
    """Upload an adapter, which the engine without torch never reads."""
    return station.world.upload(f"models/{name}.safetensors", b"x" * num_bytes)


@pytest.mark.parametrize(
    ("put", "answer"),
    [
        (Station.put_of_image, answers(503, error("SlowDown"))),
        (Station.put_of_record, answers(500, error("InternalError"))),
    ],
    ids=["picture", "record"],
)
def test_busy_store_is_retried_and_the_job_completes(
    station: Station, put: Callable[[Station, Job], Sign], answer: Callable[[Link], None]
) -> None:
    job = station.publish_held()
    refused = station.store.when(put(station, job), do=answer, times=2)
    station.release(job)

    station.assert_complete_once(job)
    assert refused.num_fired == 2


@pytest.mark.parametrize("put", [Station.put_of_image, Station.put_of_record], ids=["picture", "record"])
def test_a_write_whose_answer_is_lost_is_one_write_and_one_end(
    station: Station, put: Callable[[Station, Job], Sign]
) -> None:
    job = station.publish_held()
    lost = station.store.when(put(station, job), DONE, do=Link.reset)
    station.release(job)

    station.assert_complete_once(job)
    assert lost.num_fired == 1


def test_image_upload_cut_off_is_sent_again_whole(station: Station) -> None:
    job = station.publish_held()
    cut = station.store.when(station.put_of_image(job), do=Link.reset, after_bytes=HALF)
    station.release(job)

    station.assert_complete_once(job)
    assert cut.num_fired == 1
    assert multipart_uploads(station) == []


def multipart_uploads(station: Station) -> list[object]:
    found = station.world.store.client().list_multipart_uploads(Bucket=station.world.bucket)
    return list(found.get("Uploads", ()))


def test_adapter_download_cut_off_is_fetched_again(station: Station, worker: Worker) -> None:
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


def test_adapter_download_below_the_minimum_rate_is_retried_long_before_its_deadline(
    station: Station, worker: Worker
) -> None:
    path = adapter(station, "slow")
    read = station.sign("GET", "models/slow.safetensors")
    reads: list[Link] = []

    def be_quick_again(link: Link) -> None:
        reads.append(link)
        if len(reads) == 2:
            station.store.pass_on()

    station.store.when(read, DONE, do=lambda _: station.store.drip(0.01, DOWN), after_bytes=HALF)
    station.store.when(read, do=be_quick_again, times=None)

    retried_before = num_retried(worker)
    job = station.publish(lora_path=path)
    eventually(lambda: len(reads) == 2, worker.log_tail)

    station.assert_complete_once(job)
    assert num_retried(worker) == retried_before


def test_job_without_its_adapter_fails_and_draws_nothing(station: Station) -> None:
    job = station.publish(lora_path=f"s3://{station.world.bucket}/models/missing.safetensors")

    station.assert_failed_once(job, "LORA_NOT_FOUND")
    station.world.wait_until_clean()
    assert station.num_runs(job) == 0
    assert station.object_of(job) not in station.world.keys("generations/")


def test_adapter_uploaded_a_moment_after_its_job_is_found(station: Station) -> None:
    look = station.sign("HEAD", "models/late.safetensors")
    looked = station.store.when(look, Sign(DOWN, b"HTTP/1.1 404"), do=lambda _: None)
    job = station.publish(lora_path=f"s3://{station.world.bucket}/models/late.safetensors")
    assert looked.fired.wait(HANG_SECONDS)
    adapter(station, "late")

    station.assert_complete_once(job)


@pytest.mark.parametrize("code", ["ExpiredToken", pytest.param("RequestTimeTooSkewed", marks=long)])
def test_store_that_refuses_the_worker_s_keys_fails_no_job_and_stops_consuming(
    station: Station, worker: Worker, code: str
) -> None:
    drawn = station.publish_held()
    station.store.when(Sign(UP), do=answers(403, error(code)), times=None)
    station.release(drawn)
    eventually(lambda: code in worker.get("/health/ready")[1], worker.log_tail)
    time.sleep(PAUSE_SECONDS)
    waiting = station.publish()
    time.sleep(PAUSE_SECONDS)
    station.world.wait_for_depth(1, 1)

    station.store.pass_on()

    station.assert_complete_once(drawn)
    station.assert_complete_once(waiting)
    eventually(lambda: any(code in line["reason"] for line in worker.events("breaker open")))


def test_image_of_another_task_is_replaced_and_logged(station: Station, worker: Worker) -> None:
    job = station.publish_held()
    other = {"task-id": "another", "sha256": "another"}
    station.world.store.client().put_object(
        Bucket=station.world.bucket, Key=station.object_of(job), Body=b"another", Metadata=other
    )
    station.release(job)

    station.assert_complete_once(job)
    eventually(lambda: len(worker.events("another task's picture replaced")) == 1, worker.log_tail)
    assert worker.events("another task's picture replaced")[0]["other_task_id"] == "another"


def test_store_without_conditional_writes_is_written_to_without_them(station: Station, worker: Worker) -> None:
    # What a store can do is found out by each worker once.
    worker.kill()
    station.store.when(Sign(UP, b"If-None-Match: *"), do=answers(501, error("NotImplemented")), times=None)
    worker = start_worker(station)

    job = station.publish()
    station.assert_complete_once(job)
    eventually(lambda: len(worker.events("the store has no conditional writes")) == 1)

    # The record is a fence all the same.
    station.world.publish(task_id=job.task_id, generation_id=job.generation_id)
    eventually(lambda: len(worker.events("job out")) == 2, worker.log_tail)
    station.assert_complete_once(job)
    worker.kill()


def test_a_redirect_to_another_host_is_not_followed(station: Station, worker: Worker) -> None:
    path = adapter(station, "moved")
    with Proxy(station.world.store.port) as elsewhere:
        there = f"http://{elsewhere.host}:{elsewhere.port}/{station.world.bucket}/models/moved.safetensors"
        look = station.sign("HEAD", "models/moved.safetensors")
        station.store.when(look, do=answers(307, Location=there), times=None)

        retried_before = num_retried(worker)
        job = station.publish(lora_path=path)
        wait_for_retry(worker, retried_before)
        station.store.pass_on()

        station.assert_complete_once(job)
        assert elsewhere.num_connections == 0


def test_a_store_that_fails_one_job_for_ever_fails_it_once_and_no_other(station: Station, worker: Worker) -> None:
    world = station.world
    doomed = station.publish_held()
    station.store.when(station.put_of_image(doomed), do=answers(500), times=None)
    retried_before = num_retried(worker)
    station.release(doomed)

    # While that one goes round, others are drawn.
    wait_for_retry(worker, retried_before)
    other = station.publish()
    assert world.wait_for_end(other.generation_id).kind == "complete"
    station.assert_failed_once(doomed, "STORAGE_UNAVAILABLE")

    world.wait_until_clean(dead=1)
    assert "STORAGE_UNAVAILABLE" in world.dead_letters()[0][1]
    assert station.num_runs(doomed) == 3
    assert station.object_of(doomed) not in world.keys("generations/")
    assert world.backend.ends(doomed.generation_id)[0].body["retry_count"] == 2


@long
def test_call_to_a_hanging_store_times_out_and_the_job_is_retried(station: Station, worker: Worker) -> None:
    job = station.publish_held()
    retried_before = num_retried(worker)
    station.store.black_hole()
    station.release(job)
    wait_for_retry(worker, retried_before)
    station.store.pass_on()

    station.assert_complete_once(job, num_runs=2)


def test_object_that_never_arrives_blocks_half_of_the_lanes_and_other_jobs_are_drawn(
    station: Station, worker: Worker
) -> None:
    path = adapter(station, "hung")
    station.store.when(station.sign("GET", "models/hung.safetensors"), do=Link.swallow, times=None)
    hung = [station.publish(lora_path=path) for _ in range(NUM_PLACES)]
    station.world.wait_for_depth(0, NUM_PLACES)

    good = station.publish(lora_path=adapter(station, "good"))

    assert station.world.wait_for_end(good.generation_id).kind == "complete"
    # Places were given up for it: those that hold on do so for minutes.
    assert sum(len(station.world.backend.ends(job.generation_id)) for job in hung) < NUM_PLACES
    hung_ids = {job.task_id for job in hung}
    reasons = [event["reason"] for event in worker.events("job broke off") if event["task_id"] in hung_ids]
    assert [reason for reason in reasons if "other jobs need the place" not in reason] == []
    station.store.pass_on()
    station.store.reset()
    for job in hung:
        station.world.wait_for_end(job.generation_id)


def test_a_slow_store_costs_time_and_nothing_else(station: Station) -> None:
    station.store.delay(0.1)

    station.assert_complete_once(station.publish(lora_path=adapter(station, "far")))


@long
def test_dripping_answer_ends_with_the_call(station: Station, worker: Worker) -> None:
    job = station.publish_held()
    retried_before = num_retried(worker)
    station.store.drip(0.2, DOWN)
    station.release(job)
    wait_for_retry(worker, retried_before)
    station.store.pass_on()

    station.assert_complete_once(job, num_runs=2)
