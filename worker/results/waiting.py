"""Ends that wait for the backend, for people to see: a worker notes those in its hands in the private bucket.

RabbitMQ shows nobody what a consumer holds, and parked events are in a worker's hands nearly always.
"""

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from clients.storage.client import Storage
from clients.storage.errors import StorageError
from clients.storage.location import ObjectRef
from config.logs import log_event
from worker.results.pacing import Parked

logger = logging.getLogger(__name__)

FOLDER, SUFFIX = ".darkroom/outbox/", ".json"
CONTENT_TYPE = "application/json"
NOTE_SECONDS = 30.0
# A note that is older was left by a worker that was killed: the broker has given its events to another.
MAX_NOTE_AGE_SECONDS = 180.0
MAX_NOTE_BYTES = 1 << 20
WARN_SECONDS = 3600.0
MAX_REASON_CHARS = 200


@dataclass(frozen=True, slots=True)
class Waiting:
    """An end that waits. `since` is when it was parked, in epoch seconds; `reason` what came of the last try.

    `num_tries` counts those of all workers; `worker` is empty where it waits in the queue.
    """

    task_id: str
    generation_id: object
    kind: str
    since: float
    num_tries: int
    reason: str
    worker: str = ""


def waiting_of(parked: Parked, worker: str) -> Waiting:
    """What is told of an event in hand."""
    event = parked.event
    return Waiting(
        task_id=event.task_id,
        generation_id=event.generation_id,
        kind=event.kind.value,
        since=parked.delivery.since,
        num_tries=parked.attempt - 1,
        reason=parked.reason[:MAX_REASON_CHARS],
        worker=worker,
    )


def summary(waiting: Sequence[Waiting]) -> str:
    """One line on them all, such as "11 ends wait, failing since 2026-01-20 19:43 UTC: HTTP 500"; empty for none."""
    if not waiting:
        return ""
    oldest = min(waiting, key=lambda one: one.since)
    count = "1 end waits" if len(waiting) == 1 else f"{len(waiting)} ends wait"
    reason = f": {oldest.reason}" if oldest.reason else ""
    return f"{count}, failing since {at(oldest.since)} UTC{reason}"


def at(epoch_seconds: float) -> str:
    """A moment to the minute; empty where it is none."""
    try:
        return f"{datetime.fromtimestamp(epoch_seconds, UTC):%Y-%m-%d %H:%M}"
    except (ValueError, OverflowError, OSError):
        return ""


class WaitingNotes:
    """Notes `.darkroom/outbox/{worker}.json` in the private bucket. Thread-safe; methods raise `StorageError`."""

    def __init__(self, storage: Storage, bucket: str) -> None:
        self._storage = storage
        self._bucket = bucket

    def write(self, worker: str, waiting: Sequence[Waiting]) -> None:
        note = {"at": time.time(), "waiting": [dataclasses.asdict(one) for one in waiting]}
        self._storage.put(self._ref(worker), json.dumps(note).encode(), content_type=CONTENT_TYPE)

    def forget(self, worker: str) -> None:
        self._storage.delete(self._ref(worker))

    def read_all(self) -> list[Waiting]:
        """What all workers have noted lately. A note that cannot be read is left out, and logged."""
        found: list[Waiting] = []
        for noted in self._storage.list_objects(self._bucket, FOLDER):
            if time.time() - noted.modified_at.timestamp() < MAX_NOTE_AGE_SECONDS:
                found += self._read(ObjectRef(self._bucket, noted.key))
        return found

    def _read(self, ref: ObjectRef) -> list[Waiting]:
        content = self._storage.read(ref, max_bytes=MAX_NOTE_BYTES)
        try:
            return [_checked(Waiting(**fields)) for fields in json.loads(content)["waiting"]]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            log_event(logger, "note not read", logging.WARNING, key=ref.key, reason=type(error).__name__)
            return []

    def _ref(self, worker: str) -> ObjectRef:
        return ObjectRef(self._bucket, f"{FOLDER}{worker}{SUFFIX}")


class WaitingReporter:
    """Owner of the thread that notes what waits in a worker's hands, and warns of it once an hour.

    It ends when `is_draining` is set, and takes its note away: the broker shows what then goes back.
    """

    def __init__(
        self,
        worker: str,
        notes: WaitingNotes,
        in_hand: Callable[[], Sequence[Parked]],
        is_draining: threading.Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._worker = worker
        self._notes = notes
        self._in_hand = in_hand
        self._is_draining = is_draining
        self._clock = clock
        self._has_note = False
        self._warned_at: float | None = None

    def start(self) -> None:
        threading.Thread(target=self._run, name="waiting", daemon=True).start()

    def _run(self) -> None:
        while not self._is_draining.wait(NOTE_SECONDS):
            self.report()
        self._note([])

    def report(self) -> None:
        """Note what waits now; warn where the last warning is an hour ago."""
        waiting = [waiting_of(parked, self._worker) for parked in self._in_hand()]
        self._note(waiting)
        is_due = self._warned_at is None or self._clock() - self._warned_at >= WARN_SECONDS
        if waiting and is_due:
            self._warned_at = self._clock()
            oldest = min(waiting, key=lambda one: one.since)
            log_event(
                logger,
                "ends wait for the backend",
                logging.WARNING,
                num_ends=len(waiting),
                since=at(oldest.since),
                reason=oldest.reason,
            )

    def _note(self, waiting: Sequence[Waiting]) -> None:
        try:
            if waiting:
                self._has_note = True
                self._notes.write(self._worker, waiting)
            elif self._has_note:
                self._notes.forget(self._worker)
                self._has_note = False
        except StorageError as error:
            log_event(logger, "waiting ends not noted", reason=str(error))


def _checked(waiting: Waiting) -> Waiting:
    """Raises `TypeError` for a note that no worker wrote."""
    texts = (waiting.task_id, waiting.kind, waiting.reason, waiting.worker)
    if not all(isinstance(text, str) for text in texts) or not isinstance(waiting.since, int | float):
        raise TypeError("a field is of a wrong kind")
    return waiting
