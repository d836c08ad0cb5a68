"""The countdown of `darkroom run --exit-when-idle`: how long a worker has had nothing to do."""

import time
from collections.abc import Callable


class IdleCountdown:
    """Decides when a worker has been idle for long enough. Ticked by one thread.

    A worker that does not consume, because the engine is loading, the broker is away or a part refuses it, is not idle:
    jobs may wait that it will take.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._since: float | None = None
        self._num_taken = 0

    def is_over(self, *, is_consuming: bool, is_at_work: bool, has_tasks: bool, num_taken: int) -> bool:
        """Return whether the worker has consumed for that long without work, and has none in hand now.

        `is_at_work`: it runs a job or holds an end that the backend has not accepted. `has_tasks`: a delivery is being
        passed on, which is not work of its own: the countdown goes on, and ends after it. `num_taken` counts the
        runs begun, for those that come and go between two ticks, and what was taken from the queues of jobs, since jobs
        may wait behind what is none.
        """
        if not is_consuming or is_at_work or num_taken != self._num_taken:
            self._num_taken = num_taken
            self._since = None
            return False
        if self._since is None:
            self._since = self._clock()
        return not has_tasks and self._clock() - self._since >= self.seconds
