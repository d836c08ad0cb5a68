"""What jobs name in the store, fetched from a real one: one version of everything, and whose fault a failure is."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Event

import pytest

from clients.storage.cache import DownloadCache
from clients.storage.client import Storage
from clients.storage.errors import (
    AccessDenied,
    BucketNotFound,
    ObjectChanged,
    ObjectDamaged,
    ObjectNotFound,
    StorageError,
)
from clients.storage.location import ObjectRef
from clients.storage.objects import ObjectStat
from config.model import DEFAULT_MODEL
from config.store import StoreSettings
from inference.request import AdapterFile
from tests.worker.jobs.inputs.test_references import FACTS
from worker.breakers import STORE_THRESHOLD, Breaker, StoreGate
from worker.errors import JobFailed
from worker.jobs.disposition import Disposition, decide
from worker.jobs.inputs.fetcher import Fetcher
from worker.jobs.inputs.store_source import StoreSource
from worker.messages.job import JobAdapter

FOLDER = "models/style-1/"
CONFIG, WEIGHTS = f"{FOLDER}adapter_config.json", f"{FOLDER}adapter_model.safetensors"


class BusyPublisherStorage(Storage):
    """The real store, with a publisher that acts after each of the first `num_acts` downloads of weights."""

    def __init__(self, settings: StoreSettings, act: Callable[[int], None], *, num_acts: int) -> None:
        super().__init__(settings)
        self._act = act
        self._num_acts = num_acts
        self.num_downloads = 0

    def download(
        self, ref: ObjectRef, target: Path, *, stat: ObjectStat, max_bytes: int, deadline_seconds: float
    ) -> None:
        super().download(ref, target, stat=stat, max_bytes=max_bytes, deadline_seconds=deadline_seconds)
        self.num_downloads += 1
        if ref.key == WEIGHTS and self._num_acts:
            self._num_acts -= 1
            self._act(self._num_acts)


@pytest.fixture
def pinned() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def fetcher_of(storage: Storage, settings: StoreSettings) -> Fetcher:
    is_draining = Event()
    source = StoreSource(
        storage=storage,
        cache=DownloadCache(storage, settings.cache_dir, 10_000_000),
        private_bucket=settings.bucket,
        is_draining=is_draining,
        gate=StoreGate(Breaker("the store", STORE_THRESHOLD), is_draining),
    )
    return Fetcher(source, font_dirs=(), facts={DEFAULT_MODEL: FACTS})


def put_style(settings: StoreSettings, text: str) -> None:
    """Upload a PEFT folder whose two files have the same text in them."""
    storage = Storage(settings)
    for key in (CONFIG, WEIGHTS):
        storage.put(ObjectRef(settings.bucket, key), text.encode(), content_type="text/plain")


def style(settings: StoreSettings, key: str = FOLDER) -> JobAdapter:
    return JobAdapter(ObjectRef(settings.bucket, key), 1.0)


def contents(file: AdapterFile) -> tuple[str, str]:
    assert file.config is not None
    return file.config.read_text(), file.weights.read_text()


def test_an_adapter_folder_replaced_during_the_fetch_gives_both_files_of_one_version(
    store_settings: StoreSettings, pinned: ExitStack
) -> None:
    put_style(store_settings, "old")
    storage = BusyPublisherStorage(store_settings, lambda _: put_style(store_settings, "new"), num_acts=1)

    file = fetcher_of(storage, store_settings).adapter(style(store_settings), pinned)

    assert contents(file) == ("new", "new")


def test_an_adapter_folder_that_is_replaced_without_end_is_tried_again_later(
    store_settings: StoreSettings, pinned: ExitStack
) -> None:
    put_style(store_settings, "old")
    storage = BusyPublisherStorage(store_settings, lambda left: put_style(store_settings, f"new {left}"), num_acts=9)

    # Not the job's fault, so not a `JobFailed`.
    with pytest.raises(ObjectChanged, match="being replaced"):
        fetcher_of(storage, store_settings).adapter(style(store_settings), pinned)


def test_a_job_keeps_the_adapter_that_it_fetched_when_the_object_is_replaced(
    store_settings: StoreSettings, pinned: ExitStack
) -> None:
    put_style(store_settings, "old")
    fetcher = fetcher_of(Storage(store_settings), store_settings)

    before = fetcher.adapter(style(store_settings), pinned)
    put_style(store_settings, "new")
    after = fetcher.adapter(style(store_settings), pinned)

    assert (contents(before), contents(after)) == (("old", "old"), ("new", "new"))
    assert before.version != after.version


def test_an_adapter_that_is_fetched_again_has_the_version_it_had(
    store_settings: StoreSettings, pinned: ExitStack
) -> None:
    put_style(store_settings, "same")
    fetcher = fetcher_of(Storage(store_settings), store_settings)

    versions = {fetcher.adapter(style(store_settings, key), pinned).version for key in (FOLDER, FOLDER.rstrip("/"))}
    versions |= {fetcher.adapter(style(store_settings), pinned).version}

    assert len(versions - {""}) == 1


@pytest.mark.parametrize("key", [WEIGHTS, CONFIG])
def test_a_key_named_as_peft_names_weights_is_its_folder_where_a_config_is_beside_it(
    store_settings: StoreSettings, pinned: ExitStack, key: str
) -> None:
    # Weights by the model's own names, as a trainer writes them that adds its adapter without PEFT's wrapper.
    put_style(store_settings, "unwrapped")
    fetcher = fetcher_of(Storage(store_settings), store_settings)

    assert contents(fetcher.adapter(style(store_settings, key), pinned)) == ("unwrapped", "unwrapped")


class UnlistableStorage(Storage):
    """A store that denies what does not exist, as AWS does without the right to list a bucket."""

    def head(self, ref: ObjectRef) -> ObjectStat:
        try:
            return super().head(ref)
        except ObjectNotFound as error:
            raise AccessDenied(str(error)) from error


def test_a_file_of_that_name_without_a_config_is_a_file(store_settings: StoreSettings, pinned: ExitStack) -> None:
    alone = ObjectRef(store_settings.bucket, "models/alone/adapter_model.safetensors")
    Storage(store_settings).put(alone, b"plain", content_type="text/plain")

    for storage in (Storage(store_settings), UnlistableStorage(store_settings)):
        assert fetcher_of(storage, store_settings).adapter(JobAdapter(alone, 1.0), pinned).config is None


# --- Whose fault it is


class RefusingStorage(Storage):
    """The real store, of which `bucket` is missing until it was looked at `num_looks` times."""

    def __init__(self, settings: StoreSettings, bucket: str, *, num_looks: int) -> None:
        super().__init__(settings)
        self._missing = bucket
        self.num_looks = num_looks

    def check_bucket(self, bucket: str) -> None:
        if bucket == self._missing and self.num_looks:
            self.num_looks -= 1
            raise BucketNotFound(f"s3://{bucket}: no such bucket")
        super().check_bucket(bucket)

    def head(self, ref: ObjectRef) -> ObjectStat:
        if ref.bucket == self._missing and self.num_looks:
            raise ObjectNotFound(f"{ref}: the store answered 404")
        return super().head(ref)


def test_a_bucket_that_only_the_job_names_and_that_does_not_exist_is_its_own_failure(
    store_settings: StoreSettings, pinned: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.jobs.inputs.store_source.NOT_FOUND_RETRY_SECONDS", 0.0)
    fetcher = fetcher_of(Storage(store_settings), store_settings)

    with pytest.raises(JobFailed, match="no-such-bucket") as refusal:
        fetcher.adapter(JobAdapter(ObjectRef("no-such-bucket", "a.safetensors"), 1.0), pinned)

    assert refusal.value.code == "LORA_NOT_FOUND"


def test_a_bucket_of_the_worker_s_own_that_is_missing_is_waited_for(
    store_settings: StoreSettings, pinned: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.jobs.inputs.store_source.NOT_FOUND_RETRY_SECONDS", 0.0)
    monkeypatch.setattr("worker.breakers.PAUSES_SECONDS", (0.0, 0.0))
    put_style(store_settings, "here")
    storage = RefusingStorage(store_settings, store_settings.bucket, num_looks=3)

    file = fetcher_of(storage, store_settings).adapter(style(store_settings), pinned)

    assert (contents(file), storage.num_looks) == (("here", "here"), 0)


@pytest.mark.parametrize("error", [ObjectDamaged("cut short"), ObjectChanged("replaced again")])
def test_download_damaged_by_the_store_does_not_fail_the_job(
    store_settings: StoreSettings, pinned: ExitStack, error: StorageError
) -> None:
    class DamagingStorage(Storage):
        def download(
            self, ref: ObjectRef, target: Path, *, stat: ObjectStat, max_bytes: int, deadline_seconds: float
        ) -> None:
            raise error

    put_style(store_settings, "good")
    fetcher = fetcher_of(DamagingStorage(store_settings), store_settings)

    with pytest.raises(ObjectDamaged) as raised:
        fetcher.adapter(style(store_settings), pinned)
    assert decide(raised.value, 1).disposition is Disposition.RETRY
    with pytest.raises(ObjectDamaged):
        fetcher.image(ObjectRef(store_settings.bucket, WEIGHTS), "init_image_path", "RGB")
