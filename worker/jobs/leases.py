"""Leases keep jobs that outlive the broker's consumer_timeout: a copy in the lease queue and a note in the bucket.

The lease queue delivers the copy again after a while. As long as the note is renewed, the job is running and the copy
goes back to the queue; a note that has expired means that its worker is gone.
"""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Self

from clients.storage.client import Storage
from clients.storage.errors import ObjectNotFound, StorageError
from clients.storage.location import ObjectRef
from config.logs import log_event
from worker.amqp.delivery import whole_number
from worker.amqp.publisher import Publisher, PublishFailed
from worker.amqp.topology import QueueNames
from worker.jobs.disposition import Disposition
from worker.jobs.runs import Run, Runs
from worker.jobs.settler import Settler
from worker.results.ledger import Ledger
from worker.strict_json import is_number, strict_json

logger = logging.getLogger(__name__)

CONTENT_TYPE = "application/json"
MAX_LEASE_BYTES = 10_000
# Shares of the broker's consumer timeout: when a job goes on lease, and how long a note holds at most.
LEASE_AFTER_SHARE = 1 / 3
VALID_SHARE = 1 / 10
# The longest that a job waits whose worker was killed while it was on lease, on top of its copy's time in the queue.
MAX_VALID_SECONDS = 30.0
RENEW_SHARE = 1 / 3  # of the time that a note holds
# How far the clocks of two workers may be apart. A note that is valid for longer than a worker would write is ignored:
# one until the year 9999 would keep its job for ever.
MAX_SKEW_SECONDS = 60.0


class Lease(NamedTuple):
    """A note: valid until that epoch second, and the number of workers that were killed with the job before."""

    until: float
    num_crashes: int

    @classmethod
    def from_json(cls, content: bytes) -> Self:
        """Decode a note. Raises `ValueError` where no worker wrote it."""
        note = strict_json(content)
        until = note.get("until") if isinstance(note, dict) else None
        if not is_number(until) or until > time.time() + MAX_VALID_SECONDS + MAX_SKEW_SECONDS:
            raise ValueError("not a lease note")
        return cls(float(until), whole_number(note.get("num_crashes"), default=0))

    @property
    def is_held(self) -> bool:
        """Whether a worker runs the job now."""
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
        """Renew the run's note if it has one. Return True once a copy is confirmed, and its deliveries can be acked.

        Raises `PublishFailed` or `StorageError`: the deliveries must then not be acked.
        """
        is_due = any(time.monotonic() - one.received_at > self._lease_after for one in run.deliveries)
        if not is_due and not run.lease_ends_at:
            return False
        self.note(run)
        if is_due:
            self._publisher.publish(
                self._names.lease,
                run.first.body,
                attempt=run.attempt,
                is_leased=True,
                num_crashes=run.num_recoveries,
                origin=run.origin,
            )
            log_event(logger, "on lease", task_id=run.task_id, generation_id=run.generation_id)
        return is_due

    def note(self, run: Run) -> None:
        """Write the run's note: it runs here, whatever worker has its message now. Raises `StorageError`."""
        run.lease_ends_at = time.time() + self._valid_for
        note = json.dumps({"until": run.lease_ends_at, "num_crashes": run.num_recoveries}).encode()
        self._storage.put(self._ref(run.task_id), note, content_type=CONTENT_TYPE)

    def find(self, task_id: str) -> Lease | None:
        """Return the job's note, expired or not; None also where it cannot be read: the ledger still fences the end."""
        try:
            return Lease.from_json(self._storage.read(self._ref(task_id), max_bytes=MAX_LEASE_BYTES))
        except ObjectNotFound:
            return None
        except (StorageError, ValueError) as error:
            log_event(logger, "lease not read", logging.WARNING, task_id=task_id, reason=str(error))
            return None

    def give_up(self, run: Run) -> None:
        """Delete the note: the run is over, or another worker is to have the job."""
        try:
            self._storage.delete(self._ref(run.task_id))
        except StorageError as error:
            log_event(logger, "lease not given up: it runs out", logging.WARNING, reason=str(error))

    def _ref(self, task_id: str) -> ObjectRef:
        return ObjectRef(self._bucket, f"jobs/{task_id}.lease")


@dataclass(frozen=True, slots=True)
class LeaseKeeper:
    """Takes and renews the leases of the jobs that run here. Any thread may call it."""

    leases: Leases
    runs: Runs
    settler: Settler
    ledger: Ledger

    def take_or_renew_all(self) -> None:
        """Put the jobs on lease whose deliveries the broker's timeout would end, and renew the notes of the others."""
        for run in self.runs.all():
            with self._keeping(run):
                deliveries = self.runs.detach_deliveries(run) if self.leases.take_or_renew(run) else []
                for delivery in deliveries:
                    self.settler.settle(delivery, Disposition.ACK)

    def note_all(self) -> None:
        """Note on all jobs that they run here, and cancel those that another worker has ended in the time that this one
        was frozen or cut off."""
        for run in self.runs.all():
            with self._keeping(run):
                self.leases.note(run)
                if self.ledger.find(run.task_id) is not None:
                    # The end of a cancelled run gives way to the one that is recorded.
                    run.cancel()

    @contextmanager
    def _keeping(self, run: Run) -> Iterator[None]:
        """Give up the lease after the block where the run is over by then; log the block's `PublishFailed` and
        `StorageError`."""
        try:
            yield
            if run.lease_ends_at and run.task_id not in self.runs:
                self.leases.give_up(run)
        except (PublishFailed, StorageError) as error:
            # Another worker may then run the job too; the ledger still lets only one end count.
            log_event(logger, "lease not taken", logging.WARNING, task_id=run.task_id, reason=str(error))
