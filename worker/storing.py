"""Pictures into the store: each once, and never over another task's in silence."""

import hashlib
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from clients.location import ObjectRef
from clients.storage import Storage
from clients.storage_errors import NotSupported
from config.logs import log_event
from worker.breakers import Gate

logger = logging.getLogger(__name__)

# A picture that is drawn is kept in hand over a restart of the store.
PICTURE_PATIENCE_SECONDS = 45.0

PNG = "image/png"
# A generation drawn again lies under the key it had: readers ask whether theirs is still the one. Without it Google's
# public objects are kept for an hour by every cache, and others as long as a reader likes.
CACHE_CONTROL = "no-cache"

# What is noted beside a picture, as the store names it.
TASK_ID, SHA256 = "task-id", "sha256"
NO_NOTES: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class PictureStore:
    """The way of every picture into a bucket, for all jobs. `put` blocks over a short outage of the store."""

    storage: Storage
    gate: Gate

    def put(self, ref: ObjectRef, png: bytes, *, task_id: str, notes: Mapping[str, str] = NO_NOTES) -> str:
        """Write one picture, and return its URL. What another task left there gives way, and the log says so.

        Beside it are noted the task, the picture's SHA-256 and the `notes`, which are ASCII.
        """
        metadata = {**notes, TASK_ID: task_id, SHA256: hashlib.sha256(png).hexdigest()}
        content = {"content_type": PNG, "metadata": metadata, "cache_control": CACHE_CONTROL}
        write = partial(self.storage.put_if_absent, ref, png, **content)
        with suppress(NotSupported):  # by a store without conditional writes, which only overwrites
            if self.gate.insist(write, patience_seconds=PICTURE_PATIENCE_SECONDS):
                return self.storage.url_of(ref)
            other = self.storage.metadata_of(ref).get(TASK_ID, "")
            if other != task_id:
                log_event(logger, "another task's picture replaced", logging.WARNING, key=ref.key, other_task_id=other)
        overwrite = partial(self.storage.put, ref, png, **content)
        self.gate.insist(overwrite, patience_seconds=PICTURE_PATIENCE_SECONDS)
        return self.storage.url_of(ref)
