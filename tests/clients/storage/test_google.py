"""Google Cloud Storage, by a server that follows its documentation, on a socket."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from clients.storage.cache import DownloadCache
from clients.storage.client import Storage
from clients.storage.errors import AccessDenied, BucketNotFound, ObjectChanged, ObjectNotFound
from clients.storage.location import LocationForbidden, ObjectRef, parse_location
from config.store import StoreSettings
from tests.support.servers.google_stand_in import KEY_ID, SECRET, GoogleStandIn
from tests.worker.results.test_ledger import event
from worker.breakers import STORE_THRESHOLD, Breaker, StoreGate
from worker.results.image_store import ImageStore
from worker.results.ledger import Ledger

BUCKET = "style_media"
HOST = "storage.googleapis.com"
KEY = "models/스타일 1/a+b=100%.safetensors"


@pytest.fixture
def google() -> Iterator[GoogleStandIn]:
    with GoogleStandIn(BUCKET) as server:
        yield server


@pytest.fixture(params=[HOST, "127.0.0.1"], ids=["by its name", "by its answers"])
def settings(google: GoogleStandIn, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> StoreSettings:
    """Build settings of an endpoint with Google's name, and of one behind another name, as private ones may be."""
    _resolve_to_loopback(monkeypatch)
    return settings_of(f"http://{request.param}:{google.port}")


def settings_of(endpoint_url: str, **others: str) -> StoreSettings:
    names = {
        "AWS_STORAGE_BUCKET_NAME": BUCKET,
        "AWS_S3_ENDPOINT_URL": endpoint_url,
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        **others,
    }
    return StoreSettings(**names)  # type: ignore[arg-type]


def _resolve_to_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = socket.getaddrinfo

    def to_loopback(host: Any, *arguments: Any, **options: Any) -> Any:
        return resolve("127.0.0.1" if host == HOST else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", to_loopback)


@pytest.fixture
def storage(settings: StoreSettings) -> Storage:
    made = Storage(settings)
    made.check_bucket(BUCKET)  # a worker asks for a record before it writes anything
    return made


def test_conditional_write_by_many_writers_succeeds_once_by_google_s_generation_match(
    google: GoogleStandIn, storage: Storage
) -> None:
    ref = ObjectRef(BUCKET, "jobs/a.json")

    with ThreadPoolExecutor(8) as pool:
        writes = pool.map(lambda n: storage.put_if_absent(ref, b"%d" % n, content_type="application/json"), range(8))
        won = list(writes)

    assert won.count(True) == 1
    assert storage.read(ref, max_bytes=10) == b"%d" % won.index(True)
    puts = [one for one in google.asked if one.method == "PUT"]
    assert {one.headers.get("x-goog-if-generation-match") for one in puts} == {"0"}
    assert not any(name.startswith("x-amz-") for one in puts for name in one.headers)


def test_object_is_put_found_read_listed_and_deleted(storage: Storage, tmp_path: Path) -> None:
    ref = ObjectRef(BUCKET, KEY)
    storage.put(ref, b"weights", content_type="text/plain", metadata={"task-id": "660f9511"})

    stat = storage.head(ref)
    assert stat.size_bytes == 7
    assert storage.read_metadata(ref).metadata == {"task-id": "660f9511"}
    storage.download(ref, tmp_path / "file", stat=stat, max_bytes=10, deadline_seconds=5)
    assert (tmp_path / "file").read_bytes() == b"weights"
    assert [found.key for found in storage.list_objects(BUCKET, "models/")] == [KEY]

    storage.delete(ref)
    storage.delete(ref)
    with pytest.raises(ObjectNotFound):
        storage.read(ref, max_bytes=1)


def test_object_replaced_after_head_is_not_read(google: GoogleStandIn, storage: Storage, tmp_path: Path) -> None:
    ref = ObjectRef(BUCKET, "models/a.safetensors")
    google.put(BUCKET, ref.key, b"before")
    stat = storage.head(ref)
    google.put(BUCKET, ref.key, b"after!")

    with pytest.raises(ObjectChanged):
        storage.download(ref, tmp_path / "file", stat=stat, max_bytes=10, deadline_seconds=5)


def test_an_object_composed_of_others_has_no_md5_and_is_fetched(
    google: GoogleStandIn, storage: Storage, tmp_path: Path
) -> None:
    google.put(BUCKET, "models/a.safetensors", b"weights", is_composed=True)
    cache = DownloadCache(storage, tmp_path / "cache", 10**6)

    with cache.fetch(ObjectRef(BUCKET, "models/a.safetensors"), max_bytes=100, deadline_seconds=5) as path:
        assert path.read_bytes() == b"weights"
    assert sum(one.method == "GET" for one in google.asked) == 1


def test_ledger_has_conditional_writes_and_the_probe_finds_them(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger(storage, BUCKET)
    first, second = event("a", "first"), event("a", "second")

    assert ledger.record(first) == first
    assert ledger.record(second) == first
    assert "the store has no conditional writes" not in caplog.messages


def test_image_is_not_cached_without_revalidation(google: GoogleStandIn, storage: Storage) -> None:
    images = ImageStore(storage, StoreGate(Breaker("the store", STORE_THRESHOLD), Event()))
    ref = ObjectRef(BUCKET, "generations/gen-1.png")

    for number in range(2):  # as new, and over another one
        images.put(ref, b"png %d" % number, task_id=str(number))

        assert google.objects[BUCKET, ref.key].headers["cache-control"] == "no-cache"
    assert google.objects[BUCKET, ref.key].metadata["task-id"] == "1"


def test_object_replaced_after_head_is_not_overwritten(google: GoogleStandIn, storage: Storage) -> None:
    ref = ObjectRef(BUCKET, "generations/gen-1.png")
    google.put(BUCKET, ref.key, b"before")
    etag = storage.read_metadata(ref).etag
    google.put(BUCKET, ref.key, b"replaced")

    assert not storage.put_if_unchanged(ref, b"late", etag=etag, content_type="image/png")
    assert storage.put_if_unchanged(ref, b"new", etag=storage.read_metadata(ref).etag, content_type="image/png")
    assert google.objects[BUCKET, ref.key].body == b"new"


def test_a_wrong_secret_and_a_missing_bucket_are_refusals(google: GoogleStandIn, settings: StoreSettings) -> None:
    wrong = Storage(settings_of(str(settings.endpoint_url), AWS_SECRET_ACCESS_KEY="wrong"))
    google.put(BUCKET, "a", b"x")
    with pytest.raises(AccessDenied):
        for _ in range(2):  # one behind another name is known by its first answer
            wrong.head(ObjectRef(BUCKET, "a"))
    with pytest.raises(BucketNotFound):
        Storage(settings).put(ObjectRef("no_such", "a"), b"x", content_type="text/plain")


# --- Locations


@pytest.mark.parametrize(
    "text",
    [
        "models/a.safetensors",
        f"gs://{BUCKET}/models/a.safetensors",
        f"s3://{BUCKET}/models/a.safetensors",
        f"https://storage.googleapis.com/{BUCKET}/models/a.safetensors",
        f"https://{BUCKET}.storage.googleapis.com/models/a.safetensors",
        f"https://storage.cloud.google.com/{BUCKET}/models/a.safetensors",
        f"https://commondatastorage.googleapis.com/{BUCKET}/models%2Fa.safetensors",
    ],
)
@pytest.mark.parametrize(
    "endpoint", ["https://storage.googleapis.com", "https://storage.europe-west1.rep.googleapis.com"]
)
def test_every_form_of_google_s_names_the_same_object(text: str, endpoint: str) -> None:
    assert parsed(text, endpoint) == ObjectRef(BUCKET, "models/a.safetensors")


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        (f"https://storage.googleapis.com/{BUCKET}/a", "https://objects.example.com"),
        (f"https://storage.cloud.google.com.evil.example/{BUCKET}/a", "https://storage.googleapis.com"),
        (f"https://evilstorage.googleapis.com/{BUCKET}/a", "https://storage.googleapis.com"),
        (f"http://storage.cloud.google.com/{BUCKET}/a", "https://storage.googleapis.com"),
        ("https://storage.googleapis.com/other_bucket/a", "https://storage.googleapis.com"),
    ],
)
def test_other_hosts_and_buckets_stay_forbidden(text: str, endpoint: str) -> None:
    with pytest.raises(LocationForbidden):
        parsed(text, endpoint)


def parsed(text: str, endpoint: str) -> ObjectRef:
    return parse_location(
        text, default_bucket=BUCKET, allowed_buckets={BUCKET}, endpoint_url=endpoint, region="us-east-1"
    )
