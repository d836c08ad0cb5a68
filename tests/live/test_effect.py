"""One end for each message, one picture for each end: workers freeze, ids are used twice, records are not ours."""

import json
import resource
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pika
import pytest

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.proxy import UP, Link, Sign
from tests.faults.station import DONE, Job, Station, answers, new_station
from tests.support.long import long
from tests.support.world import Worker, eventually
from worker.messages.identity import own_task_id
from worker.results.notifier import FRESH_SECONDS

# A guard against a hang, no measure of anything.
NUM_TRIES = 3
STORE_PAUSE_SECONDS = 1.0
# For what a worker takes besides: threads, connections, small pictures.
SPARE_BYTES = 60_000_000
STACK_BYTES = 2_000_000
CONSTANTS = {
    "worker.amqp.topology:RETRY_DELAYS_SECONDS": [1, 1],
    "worker.jobs.disposition:MAX_ATTEMPTS": NUM_TRIES,
    "worker.results.image_store:IMAGE_PATIENCE_SECONDS": 0.0,
    "worker.jobs.dispatcher:LEASE_RECHECK_SECONDS": 0.2,
    "worker.results.kind_queue:STORE_PAUSE_SECONDS": STORE_PAUSE_SECONDS,
    "clients.storage.client:CALL_DEADLINE_SECONDS": 4.0,
}
# Of a job that is held in its third step of eight.
PERCENT_HELD_AT = 25
FAILED_RECORD = Sign(UP, b'"kind": "failed"')


@pytest.fixture(scope="module")
def station(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Station]:
    with new_station(rabbitmq, s3_server, tmp_path_factory.mktemp("station")) as made:
        yield made


@pytest.fixture(autouse=True)
def _sound(station: Station) -> None:
    station.make_sound()


@pytest.fixture
def worker(station: Station) -> Worker:
    """Return the only worker, as good as new."""
    alive = running(station)
    for one in alive[1:]:
        one.kill()
    worker = alive[0] if alive else start_worker(station)
    eventually(lambda: worker.get("/health/ready")[0] == 200, worker.log_tail)
    station.world.wait_until_clean()
    return worker


def start_worker(station: Station) -> Worker:
    """Start a worker with small stacks: where its address space is limited, each thread's counts in full."""
    usual = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, usual[1]))
    try:
        return station.start_worker(constants=CONSTANTS)
    finally:
        resource.setrlimit(resource.RLIMIT_STACK, usual)


def wait_for_end(station: Station, job: Job) -> Any:
    return station.world.wait_for_end(job.generation_id)


def wait_until_marked(station: Station, job: Job) -> None:
    eventually(lambda: station.is_marked(job), station.world.workers[-1].log_tail)


def events_of(worker: Worker, name: str, job: Job) -> list[dict[str, Any]]:
    return [line for line in worker.events(name) if line.get("task_id") == job.task_id]


# --- A worker is frozen while others do its job and a newer one


def in_a_step(station: Station, worker: Worker, job: Job) -> None:
    """Freeze in a step, once its progress has been told: a call under way then could only be told after the end."""
    eventually(lambda: max(percents_of(station, job), default=0) == PERCENT_HELD_AT, worker.log_tail)
    freeze_now(worker)


def percents_of(station: Station, job: Job) -> list[int]:
    calls = station.world.backend.calls("progress", job.generation_id)
    return [call.body["progress"]["progress_percent"] for call in calls]


def before_the_image(station: Station, worker: Worker, job: Job) -> None:
    """Freeze before the image: its request is lost, and made anew once the worker resumes."""

    def freeze(link: Link) -> None:
        freeze_now(worker)
        link.reset()

    station.store.when(station.put_of_image(job), do=freeze)


def in_the_image(station: Station, worker: Worker, job: Job) -> None:
    """Freeze in the image: the store has half of it when the worker freezes, and the rest once it resumes."""
    station.store.when(station.put_of_image(job), do=freezes(worker), after_bytes=80_000)


def in_the_replacement(station: Station, worker: Worker, job: Job) -> None:
    """Freeze in the replacement of an earlier task's image, after it was checked."""
    station.world.upload(station.object_of(job), b"an earlier one")
    station.store.when(Sign(UP, b"If-Match: "), do=freezes(worker), after_bytes=80_000)


def between_two_images(station: Station, worker: Worker, job: Job) -> None:
    station.store.when(station.put_of_image(job), DONE, do=freezes(worker))


def behind_the_record(station: Station, worker: Worker, job: Job) -> None:
    station.store.when(station.put_of_record(job), DONE, do=freezes(worker))


def freezes(worker: Worker) -> Callable[[Link], None]:
    return lambda _link: freeze_now(worker)


def freeze_now(worker: Worker) -> None:
    """Return once no thread of the worker runs: the signal only queues the stop."""
    worker.process.send_signal(signal.SIGSTOP)
    eventually(partial(is_frozen, worker), worker.log_tail)


def is_frozen(worker: Worker) -> bool:
    threads = Path(f"/proc/{worker.process.pid}/task").glob("*/stat")
    try:
        return all(status.read_text().rpartition(")")[2].split()[0] == "T" for status in threads)
    except (FileNotFoundError, ProcessLookupError):
        return False  # a thread ended meanwhile


@pytest.fixture
def pair(station: Station) -> list[Worker]:
    """Return two workers, as good as new: those that an earlier test has left, or new ones."""
    for one in running(station):
        eventually(lambda one=one: one.get("/health/ready")[0] == 200, one.log_tail)  # type: ignore[misc]
    while len(running(station)) < 2:
        start_worker(station)
    station.world.wait_until_clean()
    return running(station)


def running(station: Station) -> list[Worker]:
    return [one for one in station.world.workers if one.process.poll() is None]


@pytest.mark.parametrize(
    "freeze",
    [
        in_a_step,
        pytest.param(before_the_image, marks=long),
        in_the_image,
        pytest.param(in_the_replacement, marks=long),
        pytest.param(between_two_images, marks=long),
        behind_the_record,
    ],
)
def test_worker_that_resumes_changes_no_image_and_repeats_no_end(
    station: Station, pair: list[Worker], freeze: Callable[[Station, Worker, Job], None]
) -> None:
    """Another worker has done its job meanwhile, and a newer one of the same generation."""
    shape = {"num_images": 2, "width": 256, "height": 256}
    old = station.publish_held(**shape)
    (worker,) = (one for one in pair if events_of(one, "job in", old))
    freeze(station, worker, old)
    station.release(old)
    eventually(partial(is_frozen, worker), worker.log_tail)
    frozen_at = time.time()
    station.broker.reset()
    wait_until_marked(station, old)
    new = station.publish(generation_id=old.generation_id, **shape)
    wait_until_marked(station, new)
    shown = images_of(station, new)
    reported = station.world.backend.calls("progress", old.generation_id)
    # An end that was made less than this ago is told without another look; stand-ins may have done all within it.
    eventually(lambda: time.time() > frozen_at + FRESH_SECONDS)

    worker.process.send_signal(signal.SIGCONT)
    eventually(lambda: len(events_of(worker, "job out", old)) == 1, worker.log_tail)
    station.world.wait_until_clean()

    assert images_of(station, new) == shown
    assert station.world.backend.calls("progress", old.generation_id) == reported
    reported_ids = [
        call.body["metadata"]["task_id"] for call in station.world.backend.calls("complete", old.generation_id)
    ]
    assert reported_ids == [old.task_id, new.task_id]
    assert station.world.backend.calls("failed", old.generation_id) == []


def images_of(station: Station, job: Job) -> list[tuple[str, bytes]]:
    """Return of each image the task in its metadata, and its bytes."""
    client, bucket = station.world.store.client(), station.world.bucket
    found = [
        client.get_object(Bucket=bucket, Key=f"generations/gen-{job.generation_id}{suffix}.png")
        for suffix in ("", "-2")
    ]
    images = [(one["Metadata"]["task-id"], one["Body"].read()) for one in found]
    assert {task_id for task_id, _ in images} == {job.task_id}
    return images


# --- A failure that the store does not record


def test_a_failure_that_cannot_be_recorded_is_reported_once_the_store_records_it(
    station: Station, worker: Worker
) -> None:
    refused = station.store.when(Sign(UP, b"PUT /"), do=answers(500), times=None)
    job = station.publish()
    wait_until_parked(station, worker, job)
    assert station.world.backend.ends(job.generation_id) == []
    assert refused.num_fired > 0

    station.store.pass_on()

    station.assert_failed_once(job, "STORAGE_UNAVAILABLE")
    wait_until_marked(station, job)
    # The same message again has its end.
    station.world.publish(task_id=job.task_id, generation_id=job.generation_id, prompt="a red fox")
    eventually(lambda: "known" in webhooks_of(worker, job), worker.log_tail)
    station.assert_failed_once(job, "STORAGE_UNAVAILABLE")
    station.world.wait_until_clean(dead=1)


def test_a_failure_that_was_not_recorded_gives_way_to_the_same_message_s_completion(
    station: Station, worker: Worker
) -> None:
    job = station.publish_held()
    station.store.when(Sign(UP, b"PUT /"), do=answers(500), times=None)
    station.release(job)
    wait_until_parked(station, worker, job)
    # From here on the store takes all but that one record.
    station.store.pass_on()
    station.store.when(station.put_of_record(job), FAILED_RECORD, do=answers(500), times=None)
    station.world.publish(task_id=job.task_id, generation_id=job.generation_id, prompt="a red fox")
    assert wait_for_end(station, job).kind == "complete"

    station.store.pass_on()

    eventually(lambda: len(worker.events("end dropped")) == 1, worker.log_tail)
    station.world.wait_until_clean(dead=1)
    station.world.dead_letters()
    assert [call.kind for call in station.world.backend.ends(job.generation_id)] == ["complete"]
    assert station.world.backend.calls("failed", job.generation_id) == []


def wait_until_parked(station: Station, worker: Worker, job: Job) -> None:
    """Return right after the outbox has failed to have the job's end recorded."""

    def num_refused() -> int:
        return len(events_of(worker, "end not recorded yet", job))

    eventually(lambda: num_refused() > 0, worker.log_tail)
    known = num_refused()
    eventually(lambda: num_refused() > known, worker.log_tail)


def webhooks_of(worker: Worker, job: Job) -> list[str]:
    return [line["webhook"] for line in events_of(worker, "job out", job)]


# --- One id, two messages


@pytest.mark.parametrize("is_at_once", [True, False], ids=["at_once", "one_after_the_other"])
def test_a_task_id_of_two_generations_gives_each_its_own_end(
    station: Station, worker: Worker, is_at_once: bool
) -> None:
    world = station.world
    first = station.publish_held()
    if not is_at_once:
        station.release(first)
        wait_until_marked(station, first)
    second = Job(first.task_id, world.publish(task_id=first.task_id))
    own = Job(own_task_id(first.task_id, second.generation_id), second.generation_id)
    eventually(lambda: station.num_handed(own) == 1, worker.log_tail)
    station.release(first)

    assert wait_for_end(station, own).body["metadata"]["task_id"] == own.task_id
    station.assert_complete_once(first)
    station.assert_complete_once(own)
    # And again, which is neither drawn nor reported
    world.publish(task_id=first.task_id, generation_id=second.generation_id)
    eventually(lambda: "known" in webhooks_of(worker, own), worker.log_tail)
    station.assert_complete_once(own)


def test_a_job_whose_task_id_another_worker_recorded_for_another_generation_ends_under_its_own(
    station: Station, worker: Worker
) -> None:
    other = station.publish()
    station.assert_complete_once(other)
    job = station.publish_held()
    record = station.world.store.client().get_object(Bucket=station.world.bucket, Key=f"jobs/{other.task_id}.json")
    renamed = record["Body"].read().replace(other.task_id.encode(), job.task_id.encode())
    station.world.upload(f"jobs/{job.task_id}.json", renamed)

    own = Job(own_task_id(job.task_id, job.generation_id), job.generation_id)
    for one in (job, own):
        station.release(one)

    assert wait_for_end(station, own).body["metadata"]["task_id"] == own.task_id
    station.assert_complete_once(own)


@pytest.mark.parametrize("is_at_once", [True, False], ids=["at_once", "one_after_the_other"])
def test_task_id_with_other_data_has_one_end_and_a_warning_in_the_log(
    station: Station, worker: Worker, is_at_once: bool
) -> None:
    world = station.world
    job = station.publish_held()
    if not is_at_once:
        station.release(job)
        wait_until_marked(station, job)
    # The same data is the same job, whatever is written beside it.
    again = {"task_id": job.task_id, "created_at": "2026-01-01T00:00:00Z", "retry": 2}
    known = {"generation_id": job.generation_id, "num_inference_steps": 8}
    world.publish_raw(json.dumps(again | {"data": {"prompt": "hold@3", "tries": 2} | known}).encode())
    world.publish_raw(json.dumps(again | {"data": {"prompt": "a blue whale"} | known}).encode())
    eventually(lambda: len(events_of(worker, "message dropped", job)) == 1, worker.log_tail)
    station.release(job)

    wait_until_marked(station, job)
    world.wait_until_clean()
    assert len(events_of(worker, "message dropped", job)) == 1
    assert station.posts(job) == 1
    assert station.num_runs(job) == 1


# --- More pixels than memory


def test_result_beyond_the_supervisor_s_memory_fails_its_job_and_no_worker(station: Station, worker: Worker) -> None:
    small = station.publish()
    station.assert_complete_once(small)
    status = Path(f"/proc/{worker.process.pid}/statm").read_text()
    used = int(status.split()[0]) * resource.getpagesize()
    resource.prlimit(worker.process.pid, resource.RLIMIT_AS, (used + SPARE_BYTES, resource.RLIM_INFINITY))

    job = station.publish(num_images=8, width=2048, height=2048)  # 100 MB of pixels

    station.assert_failed_once(job, "GPU_OOM")
    assert station.num_finished(job) == 2
    assert worker.metric("darkroom_engine_restarts_total") == 0
    station.assert_complete_once(station.publish())
    worker.kill()


# --- Notes and records that no worker wrote

HOSTILE = {
    "deep": b"[" * 9000,
    "deep_inside": b'{"until": ' + b'{"a":' * 1500 + b"1" + b"}" * 1501,
    "huge": b'{"until": 1e999}',
    "many_digits": b'{"until": 1' + b"0" * 6000 + b"}",
    "large": b'{"until": 1' + b"0" * 400 + b"}",
    "far_ahead": b'{"until": 253402300799}',
    "list": b"[1]",
    "null": b"null",
    "infinite": b'{"until": Infinity}',
    "no_text": b"\xff\xfe\x00",
    "empty": b"",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_foreign_lease_note_keeps_no_job(station: Station, worker: Worker, content: bytes) -> None:
    task_id = str(uuid.uuid4())
    station.world.upload(f"jobs/{task_id}.lease", content)
    job = Job(task_id, station.world.next_generation_id)
    station.world.next_generation_id += 1
    message = {
        "task_id": task_id,
        "data": {"generation_id": job.generation_id, "prompt": "a fox", "num_inference_steps": 2},
    }
    with pika.BlockingConnection(pika.URLParameters(station.world.rabbitmq.url)) as connection:
        connection.channel().basic_publish("", f"{station.world.queue}.recover", json.dumps(message).encode())

    station.assert_complete_once(job)


RECORD = {
    "task_id": "{task_id}",
    "generation_id": 1,
    "kind": "complete",
    "body": {"generation_id": 1},
    "stages": [],
}
DAMAGED = {
    "deep": b"[" * 9000,
    "deep_body": b'{"body": ' + b'{"a":' * 1500 + b"1" + b"}" * 1501,
    "list": b"[]",
    "another_task": json.dumps(RECORD | {"task_id": str(uuid.uuid4())}).encode(),
    "another_body": json.dumps(RECORD | {"body": {"generation_id": 2}}).encode(),
    "too_long": b'{"a": "' + b"a" * 1_100_000 + b'"}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_foreign_ledger_record_makes_its_job_a_dead_letter(station: Station, worker: Worker, content: bytes) -> None:
    task_id = str(uuid.uuid4())
    job = Job(task_id, station.world.next_generation_id)
    station.world.upload(f"jobs/{task_id}.json", content.replace(b"{task_id}", task_id.encode()))
    station.world.publish(task_id=task_id)

    station.world.wait_until_clean(dead=1)

    ((_, reason),) = station.world.dead_letters()
    assert f"jobs/{task_id}.json" in reason
    assert "cannot be read" in reason
    assert station.num_runs(job) == 0
    assert station.world.backend.calls(generation_id=job.generation_id) == []
    assert worker.process.poll() is None
