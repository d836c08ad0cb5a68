"""Circuit breakers: while a part refuses its credentials, the worker stops consuming instead of failing jobs."""

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from clients.storage.errors import StorageError, StorageUnavailable, StoreRefused
from clients.webhooks import WebhookKind, route_of
from config.backend import BackendSettings
from config.logs import log_event
from worker.errors import JobReleased

logger = logging.getLogger(__name__)

# A token is rotated in the middle of a request now and then; three in a row are a wrong token.
BACKEND_THRESHOLD = 3
STORE_THRESHOLD = 1
# Without a job there is no call that could succeed, so the breaker lets one try after this time.
HALF_OPEN_SECONDS = 300.0
# Between two tries of what the store refused.
PAUSES_SECONDS = (1.0, 2.0, 5.0, 10.0, 20.0)

Made = TypeVar("Made")


class Breaker:
    """Counts refusals in a row by one part; open from `threshold` on, until it accepts something. Thread-safe."""

    def __init__(self, part: str, threshold: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._part = part
        self._threshold = threshold
        self._clock = clock
        self._lock = threading.Lock()
        self._num_refusals = 0
        self._refused: set[str] = set()
        self._refused_at = 0.0
        self._reason = ""

    @property
    def reason(self) -> str:
        """Why the worker takes no jobs; empty while the breaker is closed."""
        with self._lock:
            is_recent = self._clock() - self._refused_at < HALF_OPEN_SECONDS
            return self._reason if self._num_refusals >= self._threshold and is_recent else ""

    def refuse(self, reason: str, *, of: str = "") -> None:
        """Count a refusal, or one of the message with the id `of`.

        A message counts once: it may be refused for itself, and must not open the breaker alone.
        """
        with self._lock:
            if of in self._refused:
                return
            if of:
                self._refused.add(of)
            self._num_refusals += 1
            self._refused_at = self._clock()
            self._reason = f"{self._part} refuses this worker: {reason}"
            is_new = self._num_refusals == self._threshold
        if is_new:
            log_event(logger, "breaker open", logging.ERROR, part=self._part, reason=reason)

    def accept(self) -> None:
        """Record a success, which closes the breaker."""
        with self._lock:
            was_open = self._num_refusals >= self._threshold
            self._num_refusals = 0
            self._refused.clear()
        if was_open:
            log_event(logger, "breaker closed", part=self._part)


def backend_breakers(settings: BackendSettings) -> dict[str, Breaker]:
    """Return the breaker of each origin that ends are sent to, by the settings that name its addresses.

    An origin is a protection space (RFC 7235, section 2.2): what one accepts is no evidence on another.
    """
    routes = [route_of(settings, kind) for kind in (WebhookKind.COMPLETE, WebhookKind.FAILED)]
    breakers = {route.origin: Breaker("the backend", BACKEND_THRESHOLD) for route in routes}
    return {route.setting: breakers[route.origin] for route in routes}


class StoreGate:
    """Retries what the store refuses while its breaker is open, so that no job fails for the worker's credentials."""

    def __init__(self, breaker: Breaker, is_draining: threading.Event) -> None:
        self._breaker = breaker
        self._is_draining = is_draining

    def retry_while_denied(self, work: Callable[[], Made], *, patience_seconds: float = 0.0) -> Made:
        """Retry `work` until the store accepts the credentials. Raises `JobReleased` where the worker stops first.

        Where the store is unreachable, `work` is retried for `patience_seconds`: the images are already generated.
        """
        num_refusals = 0
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                made = work()
            except StorageUnavailable:
                if time.monotonic() > deadline or self._is_draining.wait(PAUSES_SECONDS[1]):
                    raise
            except StoreRefused as error:
                self._breaker.refuse(str(error))
                pause = PAUSES_SECONDS[min(num_refusals, len(PAUSES_SECONDS) - 1)]
                num_refusals += 1
                if self._is_draining.wait(pause):
                    raise JobReleased("the worker is stopping, and the store refuses it") from error
            except StorageError:
                # The credentials are accepted; the error concerns the object.
                if num_refusals:
                    self._breaker.accept()
                raise
            else:
                if num_refusals:
                    self._breaker.accept()
                return made
