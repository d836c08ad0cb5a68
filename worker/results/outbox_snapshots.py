"""Snapshots of the undelivered events that each worker holds, in the private bucket, for operators.

RabbitMQ does not show unacked messages, and parked events are unacked nearly always.
"""

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

from clients.storage.client import Storage
from clients.storage.errors import StorageError
from clients.storage.location import ObjectRef
from config.logs import log_event
from worker.results.pacing import ParkedEvent

logger = logging.getLogger(__name__)

FOLDER, SUFFIX = ".darkroom/outbox/", ".json"
CONTENT_TYPE = "application/json"
SNAPSHOT_SECONDS = 30.0
# An older snapshot is that of a killed worker, whose events the broker has redelivered to another.
MAX_SNAPSHOT_AGE_SECONDS = 180.0
MAX_SNAPSHOT_BYTES = 1 << 20
WARN_SECONDS = 3600.0
MAX_REASON_CHARS = 200


@dataclass(frozen=True, slots=True)
class UndeliveredEvent:
    """A terminal event not delivered yet, parked at `since` (epoch seconds); `reason` is the last failure.

    `num_tries` counts the attempts of all workers; `worker` is empty where the event is ready in the queue.
    """

    task_id: str
    generation_id: object
    kind: str
    since: float
    num_tries: int
    reason: str
    worker: str = ""

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """Return the event that a snapshot holds. Raises `TypeError` for fields of types that no worker writes."""
        event = cls(**fields)
        texts = (event.task_id, event.kind, event.reason, event.worker)
        if not all(isinstance(text, str) for text in texts) or not isinstance(event.since, int | float):
            raise TypeError("a field is of a wrong kind")
        return event


def undelivered_event_of(parked: ParkedEvent, worker: str) -> UndeliveredEvent:
    """Return what a snapshot says of a parked event."""
    event = parked.event
    return UndeliveredEvent(
        task_id=event.task_id,
        generation_id=event.generation_id,
        kind=event.kind.value,
        since=parked.delivery.since,
        num_tries=parked.attempt - 1,
        reason=parked.reason[:MAX_REASON_CHARS],
        worker=worker,
    )


def summarize(waiting: Sequence[UndeliveredEvent]) -> str:
    """Return one line such as "11 ends wait, failing since 2026-01-20 19:43 UTC: HTTP 500"; empty for no events."""
    if not waiting:
        return ""
    oldest = min(waiting, key=lambda one: one.since)
    count = "1 end waits" if len(waiting) == 1 else f"{len(waiting)} ends wait"
    reason = f": {oldest.reason}" if oldest.reason else ""
    return f"{count}, failing since {format_minute(oldest.since)} UTC{reason}"


def format_minute(epoch_seconds: float) -> str:
    """Format a time to the minute; return an empty string where it is out of range."""
    try:
        return f"{datetime.fromtimestamp(epoch_seconds, UTC):%Y-%m-%d %H:%M}"
    except (ValueError, OverflowError, OSError):
        return ""


@dataclass(frozen=True, slots=True)
class SnapshotStore:
    """The objects `.darkroom/outbox/{worker}.json` in the private bucket. Thread-safe; methods raise `StorageError`."""

    storage: Storage
    bucket: str

    def write(self, worker: str, waiting: Sequence[UndeliveredEvent]) -> None:
        """Replace the worker's snapshot."""
        snapshot = {"at": time.time(), "waiting": [dataclasses.asdict(one) for one in waiting]}
        self.storage.put(self._ref(worker), json.dumps(snapshot).encode(), content_type=CONTENT_TYPE)

    def delete(self, worker: str) -> None:
        """Delete the worker's snapshot."""
        self.storage.delete(self._ref(worker))

    def read_all(self) -> list[UndeliveredEvent]:
        """Return the events of all recent snapshots. An unreadable snapshot is left out, and logged."""
        found: list[UndeliveredEvent] = []
        for snapshot in self.storage.list_objects(self.bucket, FOLDER):
            if time.time() - snapshot.modified_at.timestamp() >= MAX_SNAPSHOT_AGE_SECONDS:
                continue
            content = self.storage.read(ObjectRef(self.bucket, snapshot.key), max_bytes=MAX_SNAPSHOT_BYTES)
            try:
                found += [UndeliveredEvent.from_fields(fields) for fields in json.loads(content)["waiting"]]
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                log_event(logger, "note not read", logging.WARNING, key=snapshot.key, reason=type(error).__name__)
        return found

    def _ref(self, worker: str) -> ObjectRef:
        return ObjectRef(self.bucket, f"{FOLDER}{worker}{SUFFIX}")


class SnapshotWriter:
    """Owner of the thread that writes a worker's snapshot, and logs a warning of undelivered events once an hour.

    It ends when `is_draining` is set, and deletes the snapshot: the broker shows what is then requeued.
    """

    def __init__(
        self,
        worker: str,
        snapshots: SnapshotStore,
        held: Callable[[], Sequence[ParkedEvent]],
        is_draining: threading.Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._worker = worker
        self._snapshots = snapshots
        self._held = held
        self._is_draining = is_draining
        self._clock = clock
        self._has_snapshot = False
        self._warned_at: float | None = None

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="waiting", daemon=True).start()

    def _run(self) -> None:
        while not self._is_draining.wait(SNAPSHOT_SECONDS):
            self.report()
        self._write([])

    def report(self) -> None:
        """Write a snapshot of the events held now; log a warning where the last is an hour old."""
        waiting = [undelivered_event_of(parked, self._worker) for parked in self._held()]
        self._write(waiting)
        is_due = self._warned_at is None or self._clock() - self._warned_at >= WARN_SECONDS
        if waiting and is_due:
            self._warned_at = self._clock()
            oldest = min(waiting, key=lambda one: one.since)
            log_event(
                logger,
                "ends wait for the backend",
                logging.WARNING,
                num_ends=len(waiting),
                since=format_minute(oldest.since),
                reason=oldest.reason,
            )

    def _write(self, waiting: Sequence[UndeliveredEvent]) -> None:
        try:
            if waiting:
                self._has_snapshot = True
                self._snapshots.write(self._worker, waiting)
            elif self._has_snapshot:
                self._snapshots.delete(self._worker)
                self._has_snapshot = False
        except StorageError as error:
            log_event(logger, "waiting ends not noted", reason=str(error))
