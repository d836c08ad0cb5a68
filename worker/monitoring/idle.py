"""The reason why the GPU is idle, and the time spent idle by reason."""

import time
from collections.abc import Callable, Collection

from worker.metrics import Metrics

# The reason nearest to the GPU wins: a job in `decode` matters more than another in `fetch`.
REASON_OF_PHASE = {
    "decode": "decoding",
    "encode": "encoding",
    "wait": "encoding",
    "compose": "fetching",
    "cut": "fetching",
    "fetch": "fetching",
    "ledger": "fetching",
}


def idle_reason(
    *,
    phases: Collection[str],
    is_engine_ready: bool,
    is_broker_connected: bool,
    is_refused: bool,
    is_switching: bool = False,
) -> str | None:
    """Return None while a denoise step runs, else what the GPU waits for. Pure."""
    if not is_engine_ready:
        return "engine_starting"
    if is_switching:
        return "switching_model"
    if "denoise" in phases:
        return None
    for phase, reason in REASON_OF_PHASE.items():
        if phase in phases:
            return reason
    if not is_broker_connected:
        return "broker_down"
    return "refused" if is_refused else "no_jobs"


class IdleTimer:
    """Idle time by reason: each tick adds the time since the last one. Ticked by one thread; any may read."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._clock = clock
        self._last = clock()
        self.reason: str | None = "engine_starting"
        self.denoising_seconds = 0.0

    def tick(self, reason: str | None) -> None:
        now = self._clock()
        if reason is None:
            self.denoising_seconds += now - self._last
        else:
            self._metrics.idle_seconds.labels(reason).inc(now - self._last)
        self.reason = reason
        self._last = now
