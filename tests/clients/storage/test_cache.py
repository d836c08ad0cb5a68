"""The download cache over the real store."""

import errno
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clients.cutoff import cutoff, is_cut_off
from clients.storage.cache import STALE_PART_SECONDS, CacheFull, DownloadCache
from clients.storage.client import Storage
from clients.storage.errors import ObjectChanged, ObjectNotFound, ObjectTooLarge, StorageUnavailable
from clients.storage.location import ObjectRef
from clients.storage.locked_folder import LockedFolder
from clients.storage.objects import ObjectStat
from config.store import StoreSettings
from tests.support.paths import ROOT

LIMIT_BYTES = 1000
CLAIM = """
import sys, time
from pathlib import Path
from clients.storage.locked_folder import LockedFolder
held = LockedFolder(Path(sys.argv[1]))
print("claimed", flush=True)
time.sleep(600)
"""


class CountingStorage(Storage):
    """The real store, counting the downloads."""

    num_downloads = 0

    def download(
        self, ref: ObjectRef, target: Path, *, stat: ObjectStat, max_bytes: int, deadline_seconds: float
    ) -> None:
        self.num_downloads += 1
        super().download(ref, target, stat=stat, max_bytes=max_bytes, deadline_seconds=deadline_seconds)


class HeldStorage(CountingStorage):
    """Downloads wait until `release` is set, and then fail where `error` is."""

    def __init__(self, settings: StoreSettings, error: Exception | None = None) -> None:
        super().__init__(settings)
        self.release = threading.Event()
        self.num_heads = 0
        self._error = error

    def head(self, ref: ObjectRef) -> ObjectStat:
        self.num_heads += 1
        return super().head(ref)

    def download(
        self, ref: ObjectRef, target: Path, *, stat: ObjectStat, max_bytes: int, deadline_seconds: float
    ) -> None:
        self.release.wait(120)
        super().download(ref, target, stat=stat, max_bytes=max_bytes, deadline_seconds=deadline_seconds)
        if self._error is not None:
            raise self._error


class FullDiskStorage(Storage):
    """The disk has room for the first bytes only."""

    def download(
        self, ref: ObjectRef, target: Path, *, stat: ObjectStat, max_bytes: int, deadline_seconds: float
    ) -> None:
        target.write_bytes(b"torso")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class RacedStorage(CountingStorage):
    """The object is replaced `num_races` times between the look and the download."""

    num_races = 0
    version = 0

    def head(self, ref: ObjectRef) -> ObjectStat:
        stat = super().head(ref)
        if self.num_races:
            self.num_races -= 1
            self.version += 1
            self.put(ref, b"version %d" % self.version, content_type="text/plain")
        return stat


@pytest.fixture
def storage(store_settings: StoreSettings) -> CountingStorage:
    return CountingStorage(store_settings)


@pytest.fixture
def folder(store_settings: StoreSettings) -> Path:
    return store_settings.cache_dir


@pytest.fixture
def cache(storage: CountingStorage, folder: Path) -> DownloadCache:
    return DownloadCache(storage, folder, LIMIT_BYTES)


@pytest.fixture
def ref(store_settings: StoreSettings) -> ObjectRef:
    return ObjectRef(store_settings.bucket, "models/lora.safetensors")


def put(storage: Storage, ref: ObjectRef, body: bytes) -> ObjectRef:
    storage.put(ref, body, content_type="application/octet-stream")
    return ref


def put_many(storage: Storage, ref: ObjectRef, *, num_bytes: int, names: str) -> list[ObjectRef]:
    return [put(storage, ObjectRef(ref.bucket, name), name.encode() * num_bytes) for name in names]


def fetch(cache: DownloadCache, ref: ObjectRef, *, max_bytes: int = 10_000) -> bytes:
    with cache.fetch(ref, max_bytes=max_bytes, deadline_seconds=5) as path:
        return path.read_bytes()


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_an_object_is_downloaded_once_and_keeps_its_extension(
    cache: DownloadCache, storage: CountingStorage, ref: ObjectRef
) -> None:
    put(storage, ref, b"weights")

    assert [fetch(cache, ref) for _ in range(3)] == [b"weights"] * 3
    assert storage.num_downloads == 1
    assert cache.size_bytes == 7
    with cache.fetch(ref, max_bytes=100, deadline_seconds=5) as path:
        assert path.suffix == ".safetensors"


def test_no_key_decides_a_path(cache: DownloadCache, storage: CountingStorage, ref: ObjectRef, folder: Path) -> None:
    odd = put(storage, ObjectRef(ref.bucket, "a/b.s%2f한"), b"x")

    with cache.fetch(odd, max_bytes=100, deadline_seconds=5) as path:
        assert path.parent == folder
        assert path.name.isalnum()


def test_a_replaced_object_is_fetched_anew(cache: DownloadCache, storage: CountingStorage, ref: ObjectRef) -> None:
    put(storage, ref, b"before")
    fetch(cache, ref)
    put(storage, ref, b"after!")

    assert fetch(cache, ref) == b"after!"


def test_the_cache_survives_a_restart(storage: CountingStorage, ref: ObjectRef, folder: Path) -> None:
    put(storage, ref, b"weights")
    fetch(DownloadCache(storage, folder, LIMIT_BYTES), ref)

    fetch(DownloadCache(storage, folder, LIMIT_BYTES), ref)

    assert storage.num_downloads == 1


def test_a_file_of_the_wrong_size_is_fetched_again(
    cache: DownloadCache, storage: CountingStorage, ref: ObjectRef, folder: Path
) -> None:
    put(storage, ref, b"weights")
    fetch(cache, ref)
    next(folder.iterdir()).write_bytes(b"wei")

    assert fetch(cache, ref) == b"weights"
    assert storage.num_downloads == 2


def test_the_longest_unused_file_goes_first(cache: DownloadCache, storage: CountingStorage, ref: ObjectRef) -> None:
    # Given three files that fill the cache, of which the oldest was used again
    a, b, c, d = put_many(storage, ref, num_bytes=300, names="abcd")
    for one in (a, b, c, a):
        fetch(cache, one)
        time.sleep(0.02)

    # When a fourth needs room
    fetch(cache, d)

    # Then the one that was not used for longest has gone
    assert cache.size_bytes == 900
    for one in (a, c, d):
        fetch(cache, one)
    assert storage.num_downloads == 4
    fetch(cache, b)
    assert storage.num_downloads == 5


def test_a_file_in_use_is_never_evicted(cache: DownloadCache, storage: CountingStorage, ref: ObjectRef) -> None:
    a, b, c = put_many(storage, ref, num_bytes=600, names="abc")

    with cache.fetch(a, max_bytes=1000, deadline_seconds=5) as used:
        fetch(cache, b)
        fetch(cache, c)

        assert used.read_bytes() == b"a" * 600
        assert cache.size_bytes == 1200
    fetch(cache, b)
    assert cache.size_bytes == 600


def test_an_object_too_large_is_refused_and_evicts_nothing(
    cache: DownloadCache, storage: CountingStorage, ref: ObjectRef
) -> None:
    a, b = put_many(storage, ref, num_bytes=900, names="ab")
    fetch(cache, a)

    with pytest.raises(ObjectTooLarge):
        fetch(cache, b, max_bytes=899)

    assert cache.size_bytes == 900
    assert storage.num_downloads == 1


def test_many_threads_share_one_download(store_settings: StoreSettings, ref: ObjectRef) -> None:
    storage = HeldStorage(store_settings)
    cache = DownloadCache(storage, store_settings.cache_dir, LIMIT_BYTES)
    put(storage, ref, b"weights")

    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(fetch, cache, ref) for _ in range(8)]
        wait_for_heads(storage, 8)
        storage.release.set()

        assert [job.result() for job in jobs] == [b"weights"] * 8
    assert storage.num_downloads == 1


def test_threads_that_wait_for_a_failing_download_get_its_error(store_settings: StoreSettings, ref: ObjectRef) -> None:
    storage = HeldStorage(store_settings, StorageUnavailable("too slow"))
    cache = DownloadCache(storage, store_settings.cache_dir, LIMIT_BYTES)
    put(storage, ref, b"weights")

    # Given eight threads of which one downloads
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(fetch, cache, ref) for _ in range(8)]
        wait_for_heads(storage, 8)
        storage.release.set()
        errors = [job.exception() for job in jobs]

    # Then its failure is everybody's, and nothing of it stays
    assert [str(error) for error in errors] == ["too slow"] * 8
    assert storage.num_downloads == 1
    assert names_in(store_settings.cache_dir) == []
    with pytest.raises(StorageUnavailable):
        fetch(cache, ref)
    assert storage.num_downloads == 2


class SlowFirstStorage(CountingStorage):
    """The first download hangs until its thread is cut off; the next is quick."""

    def download(
        self, ref: ObjectRef, target: Path, *, stat: ObjectStat, max_bytes: int, deadline_seconds: float
    ) -> None:
        super().download(ref, target, stat=stat, max_bytes=max_bytes, deadline_seconds=deadline_seconds)
        while self.num_downloads == 1:
            time.sleep(0.01)
            if is_cut_off():
                raise StorageUnavailable("cut off")


def test_a_thread_that_gives_up_its_download_leaves_it_to_one_that_may_wait(
    store_settings: StoreSettings, ref: ObjectRef
) -> None:
    storage = SlowFirstStorage(store_settings)
    cache = DownloadCache(storage, store_settings.cache_dir, LIMIT_BYTES)
    put(storage, ref, b"weights")

    def fetch_within(seconds: float) -> bytes:
        with cutoff(seconds, lambda: False):
            return fetch(cache, ref)

    with ThreadPoolExecutor(2) as pool:
        impatient = pool.submit(fetch_within, 1.0)
        while storage.num_downloads == 0:
            time.sleep(0.01)
        patient = pool.submit(fetch_within, 120.0)

        assert str(impatient.exception(120)) == "cut off"
        assert patient.result(120) == b"weights"


def wait_for_heads(storage: HeldStorage, num_heads: int) -> None:
    while storage.num_heads < num_heads:
        time.sleep(0.01)
    # The last of them still has to reach the download's lock.
    time.sleep(0.3)


def test_full_disk_is_an_error_and_leaves_no_partial_file(store_settings: StoreSettings, ref: ObjectRef) -> None:
    storage = FullDiskStorage(store_settings)
    cache = DownloadCache(storage, store_settings.cache_dir, LIMIT_BYTES)
    put(storage, ref, b"weights")

    with pytest.raises(CacheFull):
        fetch(cache, ref)

    assert names_in(store_settings.cache_dir) == []


def test_missing_object_is_an_error_and_leaves_no_file(cache: DownloadCache, ref: ObjectRef, folder: Path) -> None:
    with pytest.raises(ObjectNotFound):
        fetch(cache, ref)

    assert names_in(folder) == []


def test_object_replaced_during_the_fetch_is_fetched_again(store_settings: StoreSettings, ref: ObjectRef) -> None:
    storage = RacedStorage(store_settings)
    cache = DownloadCache(storage, store_settings.cache_dir, LIMIT_BYTES)
    put(storage, ref, b"version 0")

    storage.num_races = 1
    assert fetch(cache, ref) == b"version 1"

    put(storage, ref, b"another")
    storage.num_races = 2
    with pytest.raises(ObjectChanged):
        fetch(cache, ref)


def test_an_error_of_the_block_is_not_taken_for_the_download_s(
    cache: DownloadCache, storage: CountingStorage, ref: ObjectRef
) -> None:
    put(storage, ref, b"weights")

    with pytest.raises(ObjectChanged), cache.fetch(ref, max_bytes=100, deadline_seconds=5):
        raise ObjectChanged("of something else")

    assert fetch(cache, ref) == b"weights"


def test_only_stale_parts_are_removed_at_the_start(storage: CountingStorage, folder: Path) -> None:
    folder.mkdir()
    stale, fresh = folder / "stale.part", folder / "fresh.part"
    for part in (stale, fresh):
        part.write_bytes(b"x")
    before = time.time() - STALE_PART_SECONDS - 1
    os.utime(stale, (before, before))

    cache = DownloadCache(storage, folder, LIMIT_BYTES)

    assert names_in(folder) == ["fresh.part"]
    assert cache.size_bytes == 0


def test_the_folder_is_made_below_the_home(
    storage: CountingStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    DownloadCache(storage, Path("~/a/b"), LIMIT_BYTES)

    assert (tmp_path / "a" / "b").is_dir()


# --- Two workers with one folder


def test_a_second_cache_has_a_folder_of_its_own_until_the_first_is_gone(
    storage: CountingStorage, ref: ObjectRef, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = put_many(storage, ref, num_bytes=900, names="ab")
    first = DownloadCache(storage, folder, LIMIT_BYTES)
    fetch(first, a)
    second = DownloadCache(storage, folder, LIMIT_BYTES)
    assert "folder shared" in caplog.messages

    # What one evicts is not the other's, even while it is in use.
    with first.fetch(a, max_bytes=1000, deadline_seconds=5) as used:
        fetch(second, b)
        assert used.read_bytes() == b"a" * 900
    assert (first.size_bytes, second.size_bytes) == (900, 900)

    del first
    fetch(DownloadCache(storage, folder, LIMIT_BYTES), a)
    assert storage.num_downloads == 2


def test_a_worker_s_folder_is_free_once_its_process_was_killed(storage: CountingStorage, folder: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", CLAIM, str(folder)], cwd=ROOT, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"claimed\n"
    assert LockedFolder(folder).path == folder / "worker-2"

    other.kill()
    other.wait()

    assert LockedFolder(folder).path == folder


def test_files_not_written_by_the_cache_are_not_counted_and_not_removed(
    storage: CountingStorage, ref: ObjectRef, folder: Path
) -> None:
    folder.mkdir()
    (folder / "notes.txt").write_bytes(b"x" * 2 * LIMIT_BYTES)
    cache = DownloadCache(storage, folder, LIMIT_BYTES)

    (only,) = put_many(storage, ref, num_bytes=900, names="a")
    fetch(cache, only)

    assert cache.size_bytes == 900
    assert "notes.txt" in names_in(folder)
