"""Jobs that wait for the store: how many may, and what frees the others, on a socket that never answers."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from clients.storage.cache import DownloadCache
from clients.storage.client import Storage
from clients.storage.errors import StorageUnavailable
from clients.storage.location import ObjectRef
from tests.clients.storage.test_client import BODY, ETAG, WHOLE, settings_of
from tests.support.servers.clients_servers import Server, answer
from worker.jobs.inputs.slow_fetches import SlowFetchLimit, SlowFetchRefused

HUNG, GOOD = ObjectRef("media", "hung.safetensors"), ObjectRef("media", "good.safetensors")
HANG_SECONDS = 120.0


class HangingServer(Server):
    """Answers every HEAD, and every GET but those of the hung object."""

    def converse(self, peer: socket.socket) -> None:
        while (request := self.receive(peer)) is not None:
            if request.startswith(b"HEAD"):
                peer.sendall(answer(200, length=len(BODY), ETag=ETAG))
            elif b"hung" not in request.partition(b"\r\n")[0]:
                peer.sendall(WHOLE)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[DownloadCache]:
    with HangingServer() as server:
        yield DownloadCache(Storage(settings_of(server.url)), tmp_path / "cache", 10**9)


@pytest.fixture(autouse=True)
def _quickly_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.jobs.inputs.slow_fetches.SLOW_AFTER_SECONDS", 0.3)
    monkeypatch.setattr("clients.storage.download.MAX_DOWNLOAD_TRIES", 1)


def fetch(cache: DownloadCache, places: SlowFetchLimit, ref: ObjectRef, seconds: float = HANG_SECONDS) -> bytes:
    with (
        places.waiting_for(ref),
        cache.fetch(ref, max_bytes=10**6, deadline_seconds=seconds) as path,
    ):
        return path.read_bytes()


def errors_of(fetches: list[Future[bytes]]) -> list[object]:
    return [type(one.exception(HANG_SECONDS)) for one in fetches]


def test_waits_for_an_object_that_never_arrives_are_limited(cache: DownloadCache) -> None:
    places = SlowFetchLimit(2)
    with ThreadPoolExecutor(6) as pool:
        fetches = [pool.submit(fetch, cache, places, HUNG, 3.0) for _ in range(6)]

        errors = errors_of(fetches)

    # The one that downloads, those that wait for it, and those that gave their places up
    assert errors.count(SlowFetchRefused) == 4
    assert errors.count(StorageUnavailable) == 2


def test_an_object_known_to_be_slow_is_not_waited_for_where_no_more_may_wait(cache: DownloadCache) -> None:
    places = SlowFetchLimit(1)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(fetch, cache, places, HUNG, 5.0)
        wait_until_refused(places)

        assert fetch(cache, places, GOOD) == BODY
        with pytest.raises(SlowFetchRefused), places.waiting_for(HUNG):
            pytest.fail("there is no place to wait in")
        assert not slow.done()
        assert errors_of([slow]) == [StorageUnavailable]
    assert fetch(cache, places, GOOD) == BODY


def wait_until_refused(places: SlowFetchLimit) -> None:
    give_up_at = time.monotonic() + HANG_SECONDS
    while time.monotonic() < give_up_at:
        try:
            with places.waiting_for(HUNG):
                pass
        except SlowFetchRefused:
            return
        time.sleep(0.01)
    pytest.fail("nobody became slow")


def test_slow_fetch_frees_its_place_when_it_ends(cache: DownloadCache) -> None:
    places = SlowFetchLimit(1)
    for _ in range(2):
        with pytest.raises(StorageUnavailable) as raised:
            fetch(cache, places, HUNG, 1.0)
        assert type(raised.value) is StorageUnavailable


def test_a_quick_fetch_that_fails_keeps_its_own_error(cache: DownloadCache) -> None:
    with pytest.raises(StorageUnavailable, match="busy") as raised, SlowFetchLimit(1).waiting_for(GOOD):
        raise StorageUnavailable("busy")

    assert type(raised.value) is StorageUnavailable
