"""Store images with conditional writes, and never for a task whose end another worker has recorded."""

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

from clients.storage.client import Storage
from clients.storage.errors import NotSupported, ObjectNotFound, WriteConflict
from clients.storage.location import ObjectRef
from clients.storage.objects import ObjectMetadata
from config.logs import log_event
from watermark.decoding import decode_image
from watermark.errors import ImageInvalid, ImageTooLarge
from worker.breakers import StoreGate
from worker.results.terminal_event import TerminalEvent

logger = logging.getLogger(__name__)

# A finished image is retried across a restart of the store.
IMAGE_PATIENCE_SECONDS = 45.0
# Each failed round means another writer of the same key: two tasks of one generation make two rounds.
MAX_ROUNDS = 8
MAX_IMAGE_BYTES = 50_000_000

PNG = "image/png"
# Keys of the object's metadata.
TASK_ID, SHA256 = "task-id", "sha256"
NO_METADATA: Mapping[str, str] = MappingProxyType({})

Made = TypeVar("Made")


class AlreadyEnded(Exception):
    """The task has a recorded `end`: this run must store nothing more."""

    def __init__(self, end: TerminalEvent) -> None:
        super().__init__(f"task {end.task_id} has ended elsewhere as {end.kind.value}")
        self.end = end


@dataclass(frozen=True, slots=True)
class _File:
    """An image to be written, with its metadata."""

    ref: ObjectRef
    png: bytes
    metadata: Mapping[str, str]
    cache_control: str

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of every write, conditional or not."""
        return {"content_type": PNG, "metadata": self.metadata, "cache_control": self.cache_control}


@dataclass(frozen=True, slots=True)
class ImageStore:
    """Writes every image of every job. `put` blocks during a short outage of the store.

    The key is the generation's, so several tasks, and several runs of one task, write the same one. An image that was
    reported must not change without a new terminal event: only the very object that was read is overwritten, and only
    by a task that had no recorded end after that read. `end_of` returns a task's recorded end.

    `cache_control`: a repeated generation has the same key, so by default caches must revalidate. Without this header
    Google's public objects are cached for an hour, and others as long as a client likes.
    """

    storage: Storage
    gate: StoreGate
    end_of: Callable[[str], TerminalEvent | None] = lambda _task_id: None
    cache_control: str = "no-cache"

    def put(self, ref: ObjectRef, png: bytes, *, task_id: str, metadata: Mapping[str, str] = NO_METADATA) -> str:
        """Write one image and return its plain URL. Another task's image is replaced, with a warning in the log.

        The object's metadata are the task, the image's SHA-256 and `metadata`, which is ASCII. Raises `AlreadyEnded`.
        """
        described = {**metadata, TASK_ID: task_id, SHA256: hashlib.sha256(png).hexdigest()}
        file = _File(ref, png, described, self.cache_control)
        try:
            self._put_conditionally(file)
        except NotSupported:  # by a store without conditional writes, which only overwrites
            self.check_open(task_id)
            write = partial(self.storage.put, ref, png, **file.options)
            self._retry(write)
        return self.storage.public_url(ref)

    def check_open(self, task_id: str) -> None:
        """Raise `AlreadyEnded` where the task has a recorded end, as after a long freeze of this process."""
        end = self._retry(lambda: self.end_of(task_id))
        if end is not None:
            raise AlreadyEnded(end)

    def _put_conditionally(self, file: _File) -> None:
        for _ in range(MAX_ROUNDS):
            write = partial(self.storage.put_if_absent, file.ref, file.png, **file.options)
            if self._retry(write):
                return
            try:
                found = self._retry(lambda: self.storage.read_metadata(file.ref))
                if self._is_stored(file, found):
                    return
            except ObjectNotFound:
                continue
            # After the read: an end that is recorded later comes with an image that is stored later, whose ETag is not
            # the one in the condition.
            self.check_open(file.metadata[TASK_ID])
            if self._overwrite(file, found):
                return
        raise WriteConflict(f"{file.ref}: written by others {MAX_ROUNDS} times meanwhile")

    def _is_stored(self, file: _File, found: ObjectMetadata) -> bool:
        """Return whether the object is this image: the write's response was lost, or another run of the task wrote it.

        The files of two runs differ in their creation time alone, and the stored one may have been reported.
        """
        if found.metadata.get(TASK_ID) != file.metadata[TASK_ID]:
            return False
        if found.metadata.get(SHA256) == file.metadata[SHA256]:
            return True
        content = self._retry(lambda: self.storage.read(file.ref, max_bytes=MAX_IMAGE_BYTES))
        try:
            stored, own = (decode_image(one, "RGBA") for one in (content, file.png))
        except (ImageInvalid, ImageTooLarge):
            return False
        return stored.size == own.size and stored.tobytes() == own.tobytes()

    def _overwrite(self, file: _File, found: ObjectMetadata) -> bool:
        if not found.etag.startswith('"'):
            raise NotSupported(f"{file.ref}: the store gives no strong ETag to compare with")
        write = partial(
            self.storage.put_if_unchanged,
            file.ref,
            file.png,
            etag=found.etag,
            **file.options,
        )
        if not self._retry(write):
            return False
        other = found.metadata.get(TASK_ID, "")
        if other != file.metadata[TASK_ID]:
            log_event(logger, "another task's picture replaced", logging.WARNING, key=file.ref.key, other_task_id=other)
        return True

    def _retry(self, work: Callable[[], Made]) -> Made:
        return self.gate.retry_while_denied(work, patience_seconds=IMAGE_PATIENCE_SECONDS)
