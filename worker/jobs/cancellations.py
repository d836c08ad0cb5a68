"""Cancelling: what a backend asks on the fanout exchange, remembered for jobs that are not here yet."""

import json
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from config.redacting import quoted
from worker.messages.generation_id import RIGHT, GenerationId, is_generation_id, is_same
from worker.messages.job import Job, Undecodable

MAX_BODY_BYTES = 4096
# A cancelled job may still wait in the queue: it is remembered until even a long queue has moved on.
REMEMBERED_SECONDS = 3600.0
MAX_REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class CancelOrder:
    """Which job to cancel: by its task, or whatever job now draws for its generation."""

    task_id: str | None
    generation_id: GenerationId | None

    def names(self, task_id: str, generation_id: GenerationId) -> bool:
        return task_id == self.task_id or (self.task_id is None and is_same(generation_id, self.generation_id))


def decode_cancel(body: bytes) -> CancelOrder:
    """The order in `{"task_id": …}` or `{"generation_id": …}`; raises `Undecodable` for all else. Pure."""
    try:
        fields = json.loads(body.decode("utf-8-sig")) if len(body) <= MAX_BODY_BYTES else None
    except (ValueError, RecursionError) as error:
        raise Undecodable("a cancel order must be JSON of at most 4 kB") from error
    if not isinstance(fields, dict):
        raise Undecodable("a cancel order must be a JSON object of at most 4 kB")

    task_id, generation_id = fields.get("task_id"), fields.get("generation_id")
    if isinstance(task_id, str) and 0 < len(task_id) <= 64:
        try:
            return CancelOrder(str(uuid.UUID(task_id)), None)
        except ValueError as error:
            raise Undecodable(f"task_id {quoted(task_id)} is no UUID") from error
    if is_generation_id(generation_id):
        return CancelOrder(None, generation_id)
    raise Undecodable(f"a cancel order names a task_id (a UUID) or a generation_id ({RIGHT})")


class Cancellations:
    """The orders of the last hour. Thread-safe; `clock` gives epoch seconds, as messages do."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._received_at: OrderedDict[CancelOrder, float] = OrderedDict()

    def remember(self, order: CancelOrder) -> None:
        if order.generation_id is not None:
            order = CancelOrder(order.task_id, str(order.generation_id))  # 456 and "456" are one generation
        with self._lock:
            self._received_at.pop(order, None)
            self._received_at[order] = self._clock()
            self._forget_old()

    def covers(self, job: Job) -> bool:
        """Whether `job` was cancelled before it came. One created after the order is another try: it goes on.

        A `created_at` without a zone is UTC; a job without one may be as old as any order.
        """
        with self._lock:
            self._forget_old()
            received = [
                self._received_at.get(CancelOrder(job.task_id, None)),
                self._received_at.get(CancelOrder(None, str(job.generation_id))),
            ]
        created_at = _epoch_seconds(job.created_at) if job.created_at is not None else 0.0
        return any(at is not None and created_at <= at for at in received)

    def _forget_old(self) -> None:
        oldest = self._clock() - REMEMBERED_SECONDS
        while self._received_at:
            order, at = next(iter(self._received_at.items()))
            if at >= oldest and len(self._received_at) <= MAX_REMEMBERED:
                return
            del self._received_at[order]


def _epoch_seconds(moment: datetime) -> float:
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
