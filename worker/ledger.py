"""The ledger: one record for each job in the private bucket, written once. It makes the effect of a job single."""

import dataclasses
import heapq
import logging
import threading
from datetime import UTC, datetime
from typing import NamedTuple

from clients.location import ObjectRef
from clients.storage import Storage
from clients.storage_errors import NotSupported, ObjectDamaged, ObjectNotFound, StorageError
from config.logs import log_event
from worker.events import TerminalEvent

logger = logging.getLogger(__name__)

# Tags are told back, and of a message of 256 kB JSON may make six times as much.
MAX_RECORD_BYTES = 2 * 1024 * 1024
CONTENT_TYPE = "application/json"
FOLDER, SUFFIX = "jobs/", ".json"
# Not among the records: people list those.
PROBE_KEY = ".darkroom/conditional-writes"
LONG_AGO = datetime.min.replace(tzinfo=UTC)


class Entry(NamedTuple):
    """A record in the bucket's listing: whose, and when it was last written."""

    modified_at: datetime
    task_id: str


def key_of(task_id: str) -> str:
    """Where a job's record lies."""
    return f"{FOLDER}{task_id}{SUFFIX}"


class Ledger:
    """`jobs/{task_id}.json`: how each job ended. The first writer wins; everybody else adopts what it wrote."""

    def __init__(self, storage: Storage, bucket: str) -> None:
        self._storage = storage
        self.bucket = bucket
        self._probing = threading.Lock()
        self._is_conditional: bool | None = None  # None: the store was not tried yet

    def find(self, task_id: str) -> TerminalEvent | None:
        """The recorded end of the job, or None. Raises `StorageError`: not knowing is not the same as None."""
        try:
            content = self._storage.read(self._ref(task_id), max_bytes=MAX_RECORD_BYTES)
        except ObjectNotFound:
            return None
        try:
            return TerminalEvent.from_json(content)
        except ValueError as error:
            raise ObjectDamaged(f"{self._ref(task_id)}: {error}") from error

    def newest(self, count: int, *, since: datetime = LONG_AGO) -> list[Entry]:
        """The records that were written last, the latest first. Raises `StorageError`.

        S3 lists by name only: the whole listing is gone through, and of it never more than `count` entries and a page
        are held. A record is written at the job's end, and once more when the backend has heard of it.
        """
        entries = (
            Entry(found.modified_at, found.key.removeprefix(FOLDER).removesuffix(SUFFIX))
            for found in self._storage.each_below(self.bucket, FOLDER)
            if found.key.endswith(SUFFIX) and found.modified_at >= since
        )
        return heapq.nlargest(count, entries)

    def is_delivered(self, event: TerminalEvent) -> bool:
        """Whether somebody has told the backend already. A store that does not answer counts as no."""
        try:
            known = self.find(event.task_id)
        except StorageError as error:
            log_event(logger, "ledger not asked", logging.WARNING, reason=str(error))
            return False
        return known is not None and known.is_delivered

    def record(self, event: TerminalEvent) -> TerminalEvent:
        """Write `event` unless the job already has an end; return the end it has."""
        if not self._can_refuse():
            return self._record_unless_found(event)
        if self._storage.put_if_absent(self._ref(event.task_id), event.to_json(), content_type=CONTENT_TYPE):
            return event
        existing = self.find(event.task_id)
        return existing if existing is not None else self.record(event)

    def _record_unless_found(self, event: TerminalEvent) -> TerminalEvent:
        """For a store that would overwrite. The look before leaves a gap of milliseconds between two workers."""
        existing = self.find(event.task_id)
        if existing is None:
            self._storage.put(self._ref(event.task_id), event.to_json(), content_type=CONTENT_TYPE)
        return existing or event

    def _can_refuse(self) -> bool:
        """Does the store refuse to overwrite where it is asked to? Tried out once."""
        with self._probing:
            if self._is_conditional is None:
                self._is_conditional = self._probe()
                if not self._is_conditional:
                    log_event(logger, "the store has no conditional writes", logging.WARNING, bucket=self.bucket)
            return self._is_conditional

    def _probe(self) -> bool:
        ref = ObjectRef(self.bucket, PROBE_KEY)
        try:
            # The second of two must be refused; from a worker before us, the first is.
            return not all(self._storage.put_if_absent(ref, b"{}", content_type=CONTENT_TYPE) for _ in range(2))
        except NotSupported:
            return False

    def mark_delivered(self, event: TerminalEvent) -> None:
        """Note that the backend has heard. A lost note costs one repeat under the same webhook-id, so it only logs."""
        delivered = dataclasses.replace(event, is_delivered=True)
        try:
            self._storage.put(self._ref(event.task_id), delivered.to_json(), content_type=CONTENT_TYPE)
        except StorageError as error:
            log_event(logger, "delivery not noted", logging.WARNING, reason=str(error))

    def _ref(self, task_id: str) -> ObjectRef:
        return ObjectRef(self.bucket, key_of(task_id))
