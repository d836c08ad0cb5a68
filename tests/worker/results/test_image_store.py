"""Pictures of one generation, written by several tasks and several runs, in a real store."""

import dataclasses
import threading
import uuid
from io import BytesIO

import pytest
from PIL import Image, PngImagePlugin

from clients.storage.client import Storage
from clients.storage.location import ObjectRef
from config.store import StoreSettings
from examples.parts.seaweedfs import SeaweedFS
from worker.breakers import STORE_THRESHOLD, Breaker, StoreGate
from worker.errors import ErrorCode
from worker.results.image_store import AlreadyEnded, ImageStore
from worker.results.terminal_event import TerminalEvent, failed_event

TASK, OTHER = str(uuid.uuid4()), str(uuid.uuid4())


def png(colour: str, said: str = "") -> bytes:
    """Write an image of one colour with a comment in its file."""
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", said)
    sink = BytesIO()
    Image.new("RGB", (8, 8), colour).save(sink, "PNG", pnginfo=text)
    return sink.getvalue()


class SharedKey:
    """A key of a real store, and tasks' ends that a test sets."""

    def __init__(self, settings: StoreSettings, bucket: str) -> None:
        self.ref = ObjectRef(bucket, "generations/gen-7.png")
        self.ends: dict[str, TerminalEvent] = {}
        self.others: list[tuple[str, bytes]] = []
        self.storage = Storage(settings)
        gate = StoreGate(Breaker("the store", STORE_THRESHOLD), threading.Event())
        self.store = ImageStore(self.storage, gate, self.end_of)

    def end_of(self, task_id: str) -> TerminalEvent | None:
        """Return the task's end, between the store's check and its write: here others write."""
        end = self.ends.get(task_id)
        if self.others:
            self.write(*self.others.pop())
        return end

    def write(self, task_id: str, content: bytes) -> None:
        self.storage.put(self.ref, content, content_type="image/png", metadata={"task-id": task_id})

    def put(self, content: bytes) -> None:
        self.store.put(self.ref, content, task_id=TASK)

    def end(self, task_id: str) -> None:
        self.ends[task_id] = failed_event(
            task_id=task_id, generation_id=7, code=ErrorCode.GPU_OOM, message="too large", retry_count=0
        )

    @property
    def shown(self) -> bytes:
        return self.storage.read(self.ref, max_bytes=10_000)


@pytest.fixture
def key(store_settings: StoreSettings, bucket: str) -> SharedKey:
    return SharedKey(store_settings, bucket)


def test_another_task_s_image_is_replaced_by_a_task_that_has_no_end(key: SharedKey) -> None:
    key.write(OTHER, png("red"))

    key.put(png("blue"))

    assert key.shown == png("blue")
    assert key.storage.read_metadata(key.ref).metadata["task-id"] == TASK


def test_a_task_that_has_ended_elsewhere_replaces_nothing(key: SharedKey) -> None:
    key.write(OTHER, png("red"))
    key.end(TASK)

    with pytest.raises(AlreadyEnded) as raised:
        key.put(png("blue"))

    assert raised.value.end == key.ends[TASK]
    assert key.shown == png("red")


def test_image_written_after_the_check_is_checked_again(key: SharedKey) -> None:
    key.write(OTHER, png("red"))
    key.others = [(OTHER, png("green")), (str(uuid.uuid4()), png("yellow"))]

    key.put(png("blue"))

    assert key.others == []
    assert key.shown == png("blue")


def test_another_run_s_image_of_the_task_stays_where_it_shows_the_same(key: SharedKey) -> None:
    """It may have been reported, and its bytes with it."""
    key.put(png("blue", "at noon"))

    key.put(png("blue", "at one"))

    assert key.shown == png("blue", "at noon")


@pytest.mark.parametrize("earlier", [png("red"), b"not a picture", b""], ids=["red", "no_image", "empty"])
def test_another_run_s_image_of_the_task_is_replaced_where_it_shows_something_else(
    key: SharedKey, earlier: bytes
) -> None:
    key.write(TASK, earlier)

    key.put(png("blue"))

    assert key.shown == png("blue")


@pytest.mark.parametrize("is_taken", [False, True], ids=["new", "overwritten"])
def test_image_is_a_png_with_the_cache_control_of_the_settings(
    key: SharedKey, s3_server: SeaweedFS, is_taken: bool
) -> None:
    directives = "public, max-age=31536000, immutable"
    store = dataclasses.replace(key.store, cache_control=directives)
    if is_taken:
        key.write(OTHER, png("red"))

    store.put(key.ref, png("blue"), task_id=TASK)

    found = s3_server.client().head_object(Bucket=key.ref.bucket, Key=key.ref.key)
    assert (found["ContentType"], found["CacheControl"]) == ("image/png", directives)
