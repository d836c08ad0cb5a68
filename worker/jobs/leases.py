"""Leases: a job longer at work than the broker waits for an ack is kept by a copy of its message, and a note.

The copy lies in a queue that gives it back after a while; whoever gets it looks at the note. A note that is renewed
says that the job is at work, and the copy goes back to its queue. One that has run out says that its worker is gone.
"""

import json
import logging
import time
from typing import Any, NamedTuple

from clients.storage.client import Storage
from clients.storage.errors import ObjectNotFound, StorageError
from clients.storage.location import ObjectRef
from config.logs import log_event
from worker.amqp.delivery import whole_number
from worker.amqp.publisher import Publisher
from worker.amqp.topology import QueueNames
from worker.jobs.runs import Run
from worker.strict_json import is_number, strict_json

logger = logging.getLogger(__name__)

CONTENT_TYPE = "application/json"
MAX_LEASE_BYTES = 10_000
# Shares of the broker's consumer timeout: when a job goes on lease, and how long a note holds at most.
LEASE_AFTER_SHARE = 1 / 3
VALID_SHARE = 1 / 10
# So long may a job lie that was on lease when its worker was killed, and the time of a copy in its queue.
MAX_VALID_SECONDS = 30.0
RENEW_SHARE = 1 / 3  # of the time that a note holds
# How far the clocks of two workers may be apart. A note that holds for longer than a worker could have meant is none:
# one until the year 9999 would keep its job for ever.
MAX_SKEW_SECONDS = 60.0


class Lease(NamedTuple):
    """A note: the epoch second until which the job is at work, and how many workers were killed with it before."""

    until: float
    num_crashes: int

    @property
    def is_held(self) -> bool:
        return self.until > time.time()


class Leases:
    """Notes `jobs/{task_id}.lease` in the private bucket and copies in the lease queue. Thread-safe."""

    def __init__(
        self, storage: Storage, bucket: str, publisher: Publisher, names: QueueNames, consumer_timeout_seconds: float
    ) -> None:
        self._storage = storage
        self._bucket = bucket
        self._publisher = publisher
        self._names = names
        self._lease_after = consumer_timeout_seconds * LEASE_AFTER_SHARE
        self._valid_for = min(MAX_VALID_SECONDS, consumer_timeout_seconds * VALID_SHARE)
        self.renew_every = self._valid_for * RENEW_SHARE

    def take_or_renew(self, run: Run) -> bool:
        """Renew the run's note if it has one. True where a copy is safe now, so that its deliveries can be acked.

        Raises `PublishFailed` or `StorageError`: the deliveries must then stay.
        """
        is_due = any(time.monotonic() - one.received_at > self._lease_after for one in run.deliveries)
        if not is_due and not run.lease_ends_at:
            return False
        self.note(run)
        if is_due:
            self.keep_copy(run.first.body, run.attempt, num_crashes=run.num_recoveries)
            log_event(logger, "on lease", task_id=run.task_id, generation_id=run.generation_id)
        return is_due

    def note(self, run: Run) -> None:
        """Say that the run is at work here, whoever may have got its message meanwhile. Raises `StorageError`."""
        run.lease_ends_at = time.time() + self._valid_for
        note = json.dumps({"until": run.lease_ends_at, "num_crashes": run.num_recoveries}).encode()
        self._storage.put(self._ref(run.task_id), note, content_type=CONTENT_TYPE)

    def keep_copy(self, body: bytes, attempt: int, *, num_crashes: int) -> None:
        """Put a confirmed copy of the job into the lease queue. Raises `PublishFailed`."""
        self._publisher.publish(self._names.lease, body, attempt=attempt, is_leased=True, num_crashes=num_crashes)

    def find(self, task_id: str) -> Lease | None:
        """The job's note, run out or not. Where the store cannot tell, the ledger still fences the end."""
        try:
            note = strict_json(self._storage.read(self._ref(task_id), max_bytes=MAX_LEASE_BYTES))
            return Lease(_until(note), whole_number(note.get("num_crashes"), default=0))
        except ObjectNotFound:
            return None
        except (StorageError, ValueError) as error:
            log_event(logger, "lease not read", logging.WARNING, task_id=task_id, reason=str(error))
            return None

    def give_up(self, run: Run) -> None:
        """The run is over, or another worker shall have it."""
        try:
            self._storage.delete(self._ref(run.task_id))
        except StorageError as error:
            log_event(logger, "lease not given up: it runs out", logging.WARNING, reason=str(error))

    def _ref(self, task_id: str) -> ObjectRef:
        return ObjectRef(self._bucket, f"jobs/{task_id}.lease")


def _until(note: Any) -> float:
    """When a note runs out, in epoch seconds. Raises `ValueError` where no worker wrote it."""
    until = note.get("until") if isinstance(note, dict) else None
    if not is_number(until) or until > time.time() + MAX_VALID_SECONDS + MAX_SKEW_SECONDS:
        raise ValueError("not a lease note")
    return float(until)
