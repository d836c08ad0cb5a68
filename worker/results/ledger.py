"""The ledger: one record for each job in the private bucket, written conditionally, so that a job has one effect."""

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

# A record repeats the message's tags, and JSON may make six times as much of a message of 256 kB.
MAX_RECORD_BYTES = 2 * 1024 * 1024
CONTENT_TYPE = "application/json"
FOLDER, SUFFIX = "jobs/", ".json"
# Not among the records: operators list those.
PROBE_KEY = ".darkroom/conditional-writes"
LONG_AGO = datetime.min.replace(tzinfo=UTC)


class RecordUnreadable(ObjectDamaged):
    """The object at a record's key is complete and no event of that job: no worker wrote it."""


class Entry(NamedTuple):
    """A record in the bucket's listing: its task, and when it was last written."""

    modified_at: datetime
    task_id: str


def key_of(task_id: str) -> str:
    """Return the key of a job's record."""
    return f"{FOLDER}{task_id}{SUFFIX}"


class Ledger:
    """The records `jobs/{task_id}.json`. The first writer wins; other workers adopt its event."""

    def __init__(self, storage: Storage, bucket: str) -> None:
        self._storage = storage
        self.bucket = bucket
        self._probing = threading.Lock()
        self._is_conditional: bool | None = None  # None: not probed yet

    def find(self, task_id: str) -> TerminalEvent | None:
        """Return the job's recorded event, or None where it has none. Raises `StorageError` where that is unknown."""
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
        """Return the last written records, the newest first. Raises `StorageError`.

        S3 lists by name only: the whole listing is read, and at most `count` entries and a page are in memory. A record
        is written at the job's end, and once more when its event was delivered.
        """
        entries = (
            Entry(found.modified_at, found.key.removeprefix(FOLDER).removesuffix(SUFFIX))
            for found in self._storage.list_objects(self.bucket, FOLDER)
            if found.key.endswith(SUFFIX) and found.modified_at >= since
        )
        return heapq.nlargest(count, entries)

    def is_delivered(self, event: TerminalEvent) -> bool:
        """Return whether the event was delivered by any worker; False where the store does not answer."""
        try:
            known = self.find(event.task_id)
        except StorageError as error:
            log_event(logger, "ledger not asked", logging.WARNING, reason=str(error))
            return False
        return known is not None and known.is_delivered

    def record(self, event: TerminalEvent) -> TerminalEvent:
        """Write `event` unless the job already has a recorded one; return the recorded one."""
        if not self._has_conditional_writes():
            existing = self.find(event.task_id)
            if existing is None:  # a race of milliseconds remains after the read
                self._storage.put(self._ref(event.task_id), event.to_json(), content_type=CONTENT_TYPE)
            return existing or event
        if self._storage.put_if_absent(self._ref(event.task_id), event.to_json(), content_type=CONTENT_TYPE):
            return event
        existing = self.find(event.task_id)
        return existing if existing is not None else self.record(event)

    def record_late(self, event: TerminalEvent) -> TerminalEvent | None:
        """Record an event that was parked unrecorded; return None where the job has another one by now.

        The writer of that one sends it. Where it is another generation's, this event is recorded under an id of its
        own. Raises `StorageError`.
        """
        event = dataclasses.replace(event, is_recorded=True)
        existing = self.record(event)
        if str(existing.generation_id) != str(event.generation_id):
            event = dataclasses.replace(event, task_id=own_task_id(event.task_id, event.generation_id))
            existing = self.record(event)
        is_ours = dataclasses.replace(existing, is_delivered=False) == event
        return existing if is_ours else None

    def _has_conditional_writes(self) -> bool:
        """Return whether the store supports conditional writes; probes it once."""
        with self._probing:
            if self._is_conditional is not None:
                return self._is_conditional
            ref = ObjectRef(self.bucket, PROBE_KEY)
            try:
                # The second of two writes must be refused; where an earlier worker probed, the first is.
                writes = (self._storage.put_if_absent(ref, b"{}", content_type=CONTENT_TYPE) for _ in range(2))
                self._is_conditional = not all(writes)
            except NotSupported:
                self._is_conditional = False
            if not self._is_conditional:
                log_event(logger, "the store has no conditional writes", logging.WARNING, bucket=self.bucket)
            return self._is_conditional

    def mark_delivered(self, event: TerminalEvent) -> None:
        """Mark the record as delivered. A failure costs one repeat with the same webhook-id, so it is only logged."""
        delivered = dataclasses.replace(event, is_delivered=True)
        try:
            self._storage.put(self._ref(event.task_id), delivered.to_json(), content_type=CONTENT_TYPE)
        except StorageError as error:
            log_event(logger, "delivery not noted", logging.WARNING, reason=str(error))

    def _ref(self, task_id: str) -> ObjectRef:
        return ObjectRef(self.bucket, key_of(task_id))
