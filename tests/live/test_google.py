"""A worker on a server that follows Google Cloud Storage's documentation, its bucket named as only Google names
some.
"""

import json
import uuid
from collections.abc import Iterator

import pytest

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.station import start_light_worker
from tests.support.servers.google_stand_in import KEY_ID, SECRET, GoogleStandIn
from tests.support.world import World, eventually, new_world

BUCKET = "style_media"


@pytest.fixture(scope="module")
def google() -> Iterator[GoogleStandIn]:
    with GoogleStandIn(BUCKET) as server:
        yield server


@pytest.fixture(scope="module")
def world(
    rabbitmq: RabbitMQ, s3_server: SeaweedFS, google: GoogleStandIn, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    with new_world(rabbitmq, s3_server, tmp_path_factory.mktemp("google")) as made:
        start_light_worker(
            made,
            AWS_S3_ENDPOINT_URL=google.url,
            AWS_STORAGE_BUCKET_NAME=BUCKET,
            AWS_ACCESS_KEY_ID=KEY_ID,
            AWS_SECRET_ACCESS_KEY=SECRET,
        )
        yield made


def test_a_job_is_drawn_stored_and_recorded_once_behind_google_s_condition(world: World, google: GoogleStandIn) -> None:
    google.put(BUCKET, "models/style.safetensors", b"weights")
    task_id = str(uuid.uuid4())

    generation_id = world.publish(task_id=task_id, lora_path=f"gs://{BUCKET}/models/style.safetensors")
    end = world.wait_for_end(generation_id)
    world.wait_until_clean()

    assert end.kind == "complete"
    image = google.objects[BUCKET, f"generations/gen-{generation_id}.png"]
    assert (image.metadata["task-id"], image.headers["cache-control"]) == (task_id, "no-cache")
    assert json.loads(google.objects[BUCKET, f"jobs/{task_id}.json"].body)["kind"] == "complete"
    of_record = [one for one in google.asked if one.method == "PUT" and one.target.endswith(f"/{task_id}.json")]
    assert of_record[0].headers["x-goog-if-generation-match"] == "0"
    assert world.workers[0].events("the store has no conditional writes") == []

    # The same message again meets the record.
    world.publish(task_id=task_id, generation_id=generation_id)
    eventually(lambda: len(world.workers[0].events("job out")) == 2, world.workers[0].log_tail)
    assert len(world.backend.ends(generation_id)) == 1
