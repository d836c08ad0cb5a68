"""Product jobs that are broken off between and in their stages: what was saved is not made again.

The engine runs without torch and holds on command: the background at its third step, then the refining at its own.
"""

import io
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.station import Job, Station, new_station
from tests.live.test_cancelling import cancel
from tests.support.images.products import bottle
from tests.support.world import HANG_SECONDS, Worker, eventually

RED = (250, 10, 10)
# Of the refining, which takes three steps at least.
STEPS, STRENGTH = 8, 0.5


@pytest.fixture(scope="module")
def place(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Station]:
    with new_station(rabbitmq, s3_server, tmp_path_factory.mktemp("station")) as station:
        yield station


@pytest.fixture
def station(place: Station) -> Station:
    place.make_sound()
    return place


@pytest.fixture
def worker(station: Station) -> Worker:
    """Return the only worker: one that an earlier test has left alive, or a new one."""
    last = station.world.workers[-1:]
    worker = last[0] if last and last[0].process.poll() is None else station.start_worker()
    eventually(lambda: worker.get("/health/ready")[0] == 200, worker.log_tail)
    station.world.wait_until_clean()
    return worker


def publish_held(station: Station) -> Job:
    """Publish a product job, and wait until its background is being drawn."""
    cutout = station.world.upload("uploads/cut.png", png_of(bottle()))
    return station.publish_held(
        kind="product", num_inference_steps=STEPS, product={"image_path": cutout, "refine_strength": STRENGTH}
    )


def refining(job: Job) -> Job:
    """Return the job's second request, by its id in the engine."""
    return Job(f"{job.task_id}:refine", job.generation_id)


def go_on_to_refining(station: Station, job: Job) -> None:
    station.release(job)
    station.wait_until_held(refining(job))


def png_of(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def key_of(job: Job, stage: str) -> str:
    return f"stages/gen-{job.generation_id}/{stage}.png"


def head_of(station: Station, job: Job, stage: str) -> dict[str, Any]:
    found = station.world.store.client().head_object(Bucket=station.world.bucket, Key=key_of(job, stage))
    return {name: found[name] for name in ("ETag", "LastModified", "Metadata")}


def image_of(station: Station, job: Job, stage: str) -> Image.Image:
    found = station.world.store.client().get_object(Bucket=station.world.bucket, Key=key_of(job, stage))
    return Image.open(io.BytesIO(found["Body"].read())).convert("RGB")


def assert_complete(station: Station, job: Job, *, num_refinings: int) -> None:
    station.release(refining(job))
    station.assert_complete_once(job, num_runs=1)
    assert station.num_runs(refining(job)) == num_refinings
    stages = station.world.wait_for_end(job.generation_id).body["metadata"]["stages"]
    assert set(stages) == {"cutout", "background", "composite", "refined", "final"}


def test_retried_product_job_does_not_draw_its_stored_background_again(station: Station, worker: Worker) -> None:
    job = publish_held(station)
    go_on_to_refining(station, job)
    worker.kill()
    kept = {stage: head_of(station, job, stage) for stage in ("cutout", "background", "composite")}

    second = station.start_worker()

    station.wait_until_held(refining(job), times=2)
    assert_complete(station, job, num_refinings=2)
    assert kept == {stage: head_of(station, job, stage) for stage in kept}
    assert [line["stage"] for line in second.events("stage resumed")] == ["cutout", "background", "composite"]


def test_retried_product_job_continues_from_a_background_changed_in_the_bucket(
    station: Station, worker: Worker
) -> None:
    job = publish_held(station)
    go_on_to_refining(station, job)
    worker.kill()
    station.world.upload(key_of(job, "background"), png_of(Image.new("RGB", (128, 128), RED)))

    station.start_worker()

    assert_complete(station, job, num_refinings=2)
    assert image_of(station, job, "background").getpixel((0, 0)) == RED
    assert image_of(station, job, "composite").getpixel((0, 0)) == RED


def test_engine_killed_while_refining_does_not_redraw_the_background(station: Station, worker: Worker) -> None:
    job = publish_held(station)
    go_on_to_refining(station, job)

    os.kill(worker.engine_pid(), signal.SIGKILL)

    station.wait_until_held(refining(job), times=2)
    assert_complete(station, job, num_refinings=2)
    progress = [call.body["progress"] for call in station.world.backend.calls("progress", job.generation_id)]
    percentages = [one["progress_percent"] for one in progress]
    assert percentages == sorted(set(percentages))
    assert {one["total_steps"] for one in progress} == {STEPS + STEPS // 2}


def test_stopping_worker_releases_a_product_job_after_its_background(station: Station, worker: Worker) -> None:
    job = publish_held(station)
    worker.process.send_signal(signal.SIGTERM)
    eventually(lambda: bool(worker.events("stopping")), worker.log_tail)
    time.sleep(0.5)  # a busy machine may still let it refine first: then it ends here, which is as well
    station.release(job)
    station.release(refining(job))

    assert worker.process.wait(HANG_SECONDS) == 0
    station.start_worker()

    assert_complete(station, job, num_refinings=1)


def test_product_job_cancelled_while_refining_ends(station: Station, worker: Worker) -> None:
    job = publish_held(station)
    go_on_to_refining(station, job)

    cancel(station.world, task_id=job.task_id)
    eventually(lambda: bool(worker.events("cancel order")), worker.log_tail)
    station.release(refining(job))

    station.assert_failed_once(job, "CANCELLED")
    assert station.num_finished(refining(job)) == 1
    assert station.object_of(job) not in station.world.keys("generations/")
