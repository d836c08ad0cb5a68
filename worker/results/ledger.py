"""The ledger: one record for each job in the private bucket, written once. It makes the effect of a job single."""

import dataclasses
import heapq
import logging
import threading
from datetime import UTC, datetime
from typing import NamedTuple

from clients.storage.client import Storage
from clients.storage.errors import NotSupported, ObjectDamaged, ObjectNotFound, ObjectTooLarge, StorageError
from clients.storage.location import ObjectRef
from config.logs import log_event
from worker.messages.identity import own_task_id
from worker.results.terminal_event import TerminalEvent

logger = logging.getLogger(__name__)

# Tags are told back, and of a message of 256 kB JSON may make six times as much.
MAX_RECORD_BYTES = 2 * 1024 * 1024
CONTENT_TYPE = "application/json"
FOLDER, SUFFIX = "jobs/", ".json"
# Not among the records: people list those.
PROBE_KEY = ".darkroom/conditional-writes"
LONG_AGO = datetime.min.replace(tzinfo=UTC)


class RecordUnreadable(ObjectDamaged):
    """The object under a record's key arrived whole and is no end of that job: no worker wrote it."""


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
        ref = self._ref(task_id)
        try:
            event = TerminalEvent.from_json(self._storage.read(ref, max_bytes=MAX_RECORD_BYTES))
        except ObjectNotFound:
            return None
        except (ValueError, ObjectTooLarge) as error:
            raise RecordUnreadable(f"{ref}: {error}") from error
        if event.task_id != task_id:
            raise RecordUnreadable(f"{ref}: it is the end of task {event.task_id!r:.80}")
        return event

    def newest(self, count: int, *, since: datetime = LONG_AGO) -> list[Entry]:
        """The records that were written last, the latest first. Raises `StorageError`.

        S3 lists by name only: the whole listing is gone through, and of it never more than `count` entries and a page
        are held. A record is written at the job's end, and once more when the backend has heard of it.
        """
        entries = (
            Entry(found.modified_at, found.key.removeprefix(FOLDER).removesuffix(SUFFIX))
            for found in self._storage.list_objects(self.bucket, FOLDER)
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

    def record_late(self, event: TerminalEvent) -> TerminalEvent | None:
        """Record an end that waited for the store; None where the job has had another one since. Raises `StorageError`.

        The writer of that other one sends it. Where it is another generation's, this end is recorded under an id of its
        own.
        """
        event = dataclasses.replace(event, is_recorded=True)
        existing = self.record(event)
        if str(existing.generation_id) != str(event.generation_id):
            event = dataclasses.replace(event, task_id=own_task_id(event.task_id, event.generation_id))
            existing = self.record(event)
        is_ours = dataclasses.replace(existing, is_delivered=False) == event
        return existing if is_ours else None

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
