"""A worker whose key has the rights of docs/bucket-rights.md and no others: it works, and its results open for readers.

Its buckets are private, its readers reach the store by another name than it does, and its backend has one address.
"""

import json
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import requests

from examples.parts.backend import Call
from examples.parts.rabbitmq import RabbitMQ
from tests.faults.station import Job, Station, new_station
from tests.live.test_faults_product import png_of
from tests.support.images.products import bottle
from tests.support.servers.policy_store import PolicyStore, documented_policy
from tests.support.world import HANG_SECONDS, Worker, eventually

VALID_SECONDS = 300
CACHE_CONTROL = "private, max-age=3600"
# A job at work for a third of it goes on lease.
CONSUMER_TIMEOUT_SECONDS = 6


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PolicyStore]:
    with PolicyStore(tmp_path_factory.mktemp("store"), {"worker": documented_policy()}) as running:
        running.make_buckets()
        yield running


@pytest.fixture(scope="module")
def station(rabbitmq: RabbitMQ, store: PolicyStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Station]:
    with new_station(rabbitmq, store, tmp_path_factory.mktemp("station")) as made:
        made.world.bucket = "media"
        own = {name: text for name, text in store.env_of("worker").items() if name != "AWS_S3_ENDPOINT_URL"}
        made.start_worker(
            constants={"worker.results.outbox_snapshots:SNAPSHOT_SECONDS": 0.2},
            RESULT_URL_MODE=f"presigned:{VALID_SECONDS}",
            RESULT_URL_BASE=f"http://localhost:{store.port}/pictures",
            RESULT_CACHE_CONTROL=CACHE_CONTROL,
            RABBITMQ_CONSUMER_TIMEOUT_SECONDS=str(CONSUMER_TIMEOUT_SECONDS),
            **own,
        )
        yield made


@pytest.fixture(autouse=True)
def worker(station: Station) -> Worker:
    station.make_sound()
    return station.world.workers[0]


def record_of(station: Station, job: Job) -> dict[str, Any]:
    key = f"jobs/{job.task_id}.json"
    found: dict[str, Any] = json.loads(station.world.store.client().get_object(Bucket="media", Key=key)["Body"].read())
    return found


def assert_opens(url: str) -> None:
    """Assert that the address opens by itself, and that without its signature it does not."""
    answer = requests.get(url, timeout=HANG_SECONDS)
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "image/png"), answer.text
    assert answer.headers["Cache-Control"] == CACHE_CONTROL
    assert requests.get(url.partition("?")[0], timeout=HANG_SECONDS).status_code == 403


def signed_at(url: str) -> float:
    moment = parse_qs(urlsplit(url).query)["X-Amz-Date"][0]
    return datetime.strptime(moment, "%Y%m%dT%H%M%S%z").timestamp()


def assert_secret_is_kept(station: Station, job: Job, end: Call) -> None:
    """Assert that the record has the plain addresses, and the log none that opens."""
    plain = end.body["result_url"].partition("?")[0]
    assert record_of(station, job)["body"]["result_url"] == plain
    assert "X-Amz" not in json.dumps(record_of(station, job))
    assert "X-Amz" not in station.world.workers[0].log.read_text()


def test_every_picture_opens_for_who_has_its_address(station: Station) -> None:
    job = station.publish(num_images=3)

    end = station.world.wait_for_end(job.generation_id)

    urls = end.body["metadata"]["result_urls"]
    assert urls[0].partition("?")[0] == end.body["result_url"].partition("?")[0]
    for url in {end.body["result_url"], *urls}:
        assert_opens(url)
    assert_secret_is_kept(station, job, end)


def test_event_parked_for_longer_than_an_address_lasts_is_sent_with_one_that_opens(station: Station) -> None:
    world = station.world
    # So long ago that an address of that moment is over.
    station.set_clock(-2 * VALID_SECONDS)
    station.backend.refuse()
    station.backend.reset()
    try:
        job = station.publish()
        eventually(lambda: sum(world.queues().get(".outbox", ())) == 1, world.workers[0].log_tail)
        eventually(lambda: world.keys(".darkroom/outbox/") != [], world.workers[0].log_tail)
        station.set_clock(0)
    finally:
        station.backend.listen()

    end = world.wait_for_end(job.generation_id)

    assert_opens(end.body["result_url"])
    assert abs(signed_at(end.body["result_url"]) - time.time()) < VALID_SECONDS
    assert_secret_is_kept(station, job, end)


def test_worker_needs_no_other_rights_than_the_documented_ones(station: Station) -> None:
    """Have it read and write everything: an adapter elsewhere, a product's stages, a lease, a note, a record."""
    world, client = station.world, station.world.store.client()
    client.put_object(Bucket="styles", Key="models/a.safetensors", Body=b"weights")
    cutout = world.upload("uploads/cut.png", png_of(bottle()))

    held = station.publish_held(lora_path="s3://styles/models/a.safetensors")
    eventually(lambda: f"jobs/{held.task_id}.lease" in world.keys("jobs/"), world.workers[0].log_tail)
    station.release(held)
    product = station.publish(kind="product", product={"image_path": cutout, "refine_strength": 0.5})
    ends = [world.wait_for_end(job.generation_id) for job in (held, product)]

    assert [end.kind for end in ends] == ["complete", "complete"], ends
    assert_opens(ends[1].body["result_url"])
    assert len(world.keys(f"stages/gen-{product.generation_id}/")) >= 4
    world.wait_until_clean()
    eventually(lambda: f"jobs/{held.task_id}.lease" not in world.keys("jobs/"), world.workers[0].log_tail)
    assert "AccessDenied" not in world.workers[0].log.read_text()
