"""Cancel orders of the last hour, remembered for jobs that have not arrived yet."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC

from worker.messages.cancel import CancelOrder
from worker.messages.job import Job

# A cancelled job may still wait in the queue: it is remembered until even a long queue has moved on.
REMEMBERED_SECONDS = 3600.0
MAX_REMEMBERED = 10_000


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
        """Return whether `job` was cancelled before it arrived. One created after the order is a new try, and goes on.

        A `created_at` without a zone is UTC; a job without one may be as old as any order.
        """
        with self._lock:
            self._forget_old()
            received = [
                self._received_at.get(CancelOrder(job.task_id, None)),
                self._received_at.get(CancelOrder(None, str(job.generation_id))),
            ]
        created_at = 0.0
        if job.created_at is not None:
            zoned = job.created_at if job.created_at.tzinfo else job.created_at.replace(tzinfo=UTC)
            created_at = zoned.timestamp()
        return any(at is not None and created_at <= at for at in received)

    def _forget_old(self) -> None:
        oldest = self._clock() - REMEMBERED_SECONDS
        while self._received_at:
            order, at = next(iter(self._received_at.items()))
            if at >= oldest and len(self._received_at) <= MAX_REMEMBERED:
                return
            del self._received_at[order]
