"""Previews inside the worker: encoded, stored, reported, and served."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import count
from typing import Any

import pytest
import requests
from PIL import Image

from clients.storage.errors import StorageUnavailable
from clients.storage.location import ObjectRef
from clients.webhooks import Webhook, WebhookAttempt, WebhookResult
from inference.request import Preview, StepReport
from tests.support.status_pages import served, status
from tests.support.world import HANG_SECONDS
from worker.metrics import Metrics
from worker.progress.previews import NUM_KEPT, Previewer, ShownPreview, encode
from worker.progress.reporter import ProgressReporter


class SlowStore:
    """A store whose writes last while it is held, and fail where they are to."""

    def __init__(self) -> None:
        self.is_free = threading.Event()
        self.is_free.set()
        self.is_broken = False
        self.begun: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self.written: list[tuple[str, bytes]] = []
        self.signatures = count(1)

    def put(
        self, ref: ObjectRef, body: bytes, *, content_type: str, cache_control: str, deadline_seconds: float
    ) -> None:
        assert (content_type, cache_control) == ("image/jpeg", "no-store")
        assert 0 < deadline_seconds <= 5
        self.begun.put((str(ref), body))
        assert self.is_free.wait(HANG_SECONDS)
        if self.is_broken:
            raise StorageUnavailable("the store is down")
        self.written.append((str(ref), body))

    def public_url(self, ref: ObjectRef) -> str:
        return f"https://pictures/{ref.key}"

    def result_url(self, ref: ObjectRef) -> str:
        if self.is_broken:
            raise StorageUnavailable("no key to sign with")
        return f"{self.public_url(ref)}?signed={next(self.signatures)}"


class Listener:
    """A backend that takes every progress call."""

    def __init__(self) -> None:
        self.calls: queue.Queue[Webhook] = queue.Queue()

    def send(self, webhook: Webhook, *, deadline_seconds: float) -> WebhookAttempt:
        self.calls.put(webhook)
        return WebhookAttempt(WebhookResult.DELIVERED, 200, None, "HTTP 200", is_ambiguous=False)

    def next(self) -> Any:
        return self.calls.get(timeout=HANG_SECONDS).body


@pytest.fixture
def store() -> SlowStore:
    return SlowStore()


@pytest.fixture
def previewer(store: SlowStore) -> Iterator[Previewer]:
    running = Previewer(store, "results")  # type: ignore[arg-type]
    running.start()
    yield running
    store.is_free.set()
    running.close()


def reported(step_index: int, colour: int, num_steps: int = 20) -> StepReport:
    return StepReport(step_index, num_steps, 0.1, Preview(8, 4, bytes([colour]) * 96))


def colour_of(jpeg: bytes) -> int:
    return int(Image.open(BytesIO(jpeg)).convert("L").getpixel((3, 3)))  # type: ignore[arg-type]


def wait_until(is_so: Callable[[], Any]) -> None:
    give_up_at = time.monotonic() + HANG_SECONDS
    while not is_so():
        assert time.monotonic() < give_up_at, "waited in vain"
        time.sleep(0.002)


def test_a_preview_is_a_small_jpeg_of_the_image_s_shape() -> None:
    sizes = [(16, 16), (64, 128), (128, 128), (96, 192), (256, 320)]
    jpegs = [Image.open(BytesIO(encode(Preview(*size, bytes(3 * size[0] * size[1]))))) for size in sizes]

    assert {image.format for image in jpegs} == {"JPEG"}
    assert [image.size for image in jpegs] == [(64, 64), (128, 256), (256, 256), (96, 192), (256, 320)]


def test_the_newest_preview_wins_while_the_store_is_slow(previewer: Previewer, store: SlowStore) -> None:
    # Given a store busy with the first
    track = previewer.follow("task", 456)
    store.is_free.clear()
    track.on_step(reported(5, 50))
    assert store.begun.get(timeout=HANG_SECONDS)[0] == "s3://results/previews/gen-456.jpg"

    # When three more come, nobody waits, and then only the last of them is written, and what follows it
    for step_index, colour in ((6, 100), (7, 150), (8, 200)):
        track.on_step(reported(step_index, colour))
    assert track.url is None
    store.is_free.set()
    wait_until(lambda: len(store.written) == 2)
    track.on_step(reported(9, 250))
    wait_until(lambda: len(store.written) == 3)

    assert [colour_of(body) for _, body in store.written] == pytest.approx([50, 200, 250], abs=2)
    assert track.url == "https://pictures/previews/gen-456.jpg"


def test_preview_is_not_written_after_the_end(previewer: Previewer, store: SlowStore) -> None:
    track, other = previewer.follow("task", 456), previewer.follow("other", 457)
    store.is_free.clear()
    track.on_step(reported(5, 50))
    store.begun.get(timeout=HANG_SECONDS)
    track.on_step(reported(6, 100))

    # When the job ends, then its end waits for the write that has begun, and the next is dropped
    with ThreadPoolExecutor(1) as thread:
        closing = thread.submit(track.close)
        time.sleep(0.05)
        assert not closing.done()
        store.is_free.set()
        closing.result(HANG_SECONDS)
    track.on_step(reported(7, 150))
    other.on_step(reported(1, 10))
    wait_until(lambda: len(store.written) == 2)

    assert [key for key, _ in store.written] == [
        f"s3://results/previews/gen-{generation_id}.jpg" for generation_id in (456, 457)
    ]
    shown = previewer.latest("task")
    assert shown is not None
    assert shown.step_index == 5


def test_previews_are_kept_of_the_jobs_that_were_over_last(previewer: Previewer, store: SlowStore) -> None:
    for number in range(NUM_KEPT + 2):
        track = previewer.follow(str(number), number + 1)
        track.on_step(reported(5, 50))
        wait_until(lambda: len(store.written) == number + 1)  # noqa: B023 - called at once
        track.close()
        if number == 1:  # the same task once more, at work to the end
            previewer.follow("0", 1).shown = ShownPreview(7, b"of another attempt")

    assert previewer.latest("0") == ShownPreview(7, b"of another attempt")
    assert previewer.latest("1") is None
    assert previewer.latest("2") is not None


def test_failing_store_costs_a_log_line_alone(
    previewer: Previewer, store: SlowStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.is_broken = True
    track = previewer.follow("task", 456)

    with caplog.at_level(logging.WARNING):
        track.on_step(reported(5, 50))
        wait_until(lambda: "preview not stored" in caplog.text)

    # And the page has it still, the backend is told no address, and the next one is tried
    assert track.url is None
    shown = previewer.latest("task")
    assert shown is not None
    assert (shown.step_index, colour_of(shown.jpeg)) == (5, pytest.approx(50, abs=2))
    store.is_broken = False
    track.on_step(reported(10, 100))
    wait_until(lambda: track.url)


def test_progress_names_the_preview_once_it_is_stored_and_never_waits_for_it(
    previewer: Previewer, store: SlowStore, caplog: pytest.LogCaptureFixture
) -> None:
    backend = Listener()
    reporter = ProgressReporter(backend, previewer, (25, 50, 55), Metrics())  # type: ignore[arg-type]
    reporter.start()
    track = reporter.follow("task", 456)
    store.is_free.clear()

    # While the first is being stored, progress goes on without it
    track.on_step(reported(4, 50))
    store.begun.get(timeout=HANG_SECONDS)
    track.on_step(reported(5, 60))
    webhook = backend.next()
    assert webhook["progress"]["progress_percent"] == 25
    assert "preview_url" not in webhook
    store.is_free.set()
    wait_until(lambda: track._previews.url)

    # Its address is made valid as it is sent: a webhook may have waited.
    track.on_step(StepReport(10, 20, 0.1))
    assert backend.next()["preview_url"] == "https://pictures/previews/gen-456.jpg?signed=1"

    # Where none can be, this progress is dropped like any that is not taken.
    store.is_broken = True
    track.on_step(StepReport(11, 20, 0.1))
    wait_until(lambda: "progress not sent" in caplog.text)
    track.close()
    reporter.close()
    assert backend.calls.empty()


# --- The status page


def test_http_server_serves_the_image_of_its_job_alone() -> None:
    path = "status/preview/660f9511-f3ac-52e5-b827-557766551111.jpg"
    jpeg = encode(Preview(8, 8, bytes(192)))

    with served(status, {path: jpeg}.get) as address:
        found = requests.get(f"{address}{path}?step=5", timeout=120)
        missing = [requests.get(address + path, timeout=120) for path in ("status/preview/x.jpg", "x.jpg")]

    assert (found.status_code, found.headers["Content-Type"], found.content) == (200, "image/jpeg", jpeg)
    assert found.headers["Cache-Control"] == "no-store"
    assert [answer.status_code for answer in missing] == [404, 404]
