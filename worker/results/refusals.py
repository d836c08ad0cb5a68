"""The breaker for a wrong address: a backend that refuses every end is no event's fault.

A single end that is answered 400 or 404 is a dead letter. Several in a row, with none taken between, are a host that
Django's ALLOWED_HOSTS does not name, a path twice in the address, a redirect: more jobs would be drawn for nothing.
"""

import logging
import threading
import time
from collections.abc import Callable

from config.logs import log_event

logger = logging.getLogger(__name__)

# Different ends, however often each was tried. Three generations deleted while they were drawn are nothing rare, and
# every end more is a picture more: those refused before the breaker opens are dead letters, to be replayed by a person.
REFUSED_ENDS = 5
# No jobs are taken so long; then for a moment again, as only a new end can show that the old ones were at fault.
REST_SECONDS = 300.0
TRIAL_SECONDS = 30.0

MEANINGS = {
    400: "Django answers so to a host that its ALLOWED_HOSTS does not name",
    404: "/api/webhooks/inference/… is added to BACKEND_API_URL: is a part of that path in it already?",
    405: "another service than the backend may listen there, or BACKEND_API_URL has a wrong path",
    410: "the address was given up: look at BACKEND_API_URL",
    421: "the server does not serve this host: look at BACKEND_API_URL",
    426: "the server wants another protocol: should BACKEND_API_URL begin with https?",
}
# What may be answered to every request at a wrong address. 409, 413 and 422 speak of one event.
ADDRESS_STATUSES = frozenset({*MEANINGS, *range(300, 400), 402, 406, 415, 451})


def meaning_of(status: int) -> str:
    """What to look at where a backend answers `status` to everything."""
    if 300 <= status < 400:
        return "a redirect is never followed: set BACKEND_API_URL to the final address"
    return MEANINGS.get(status, "look at BACKEND_API_URL and at the backend's log")


class AddressBreaker:
    """Open once `REFUSED_ENDS` different ends were refused in a row, until one is taken. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._refused: set[str] = set()
        self._is_open = False
        self._opened_at = 0.0
        self._status = 0

    @property
    def is_open(self) -> bool:
        """Whether refusals say nothing of the refused event."""
        return self._is_open

    @property
    def reason(self) -> str:
        """Why the worker takes no jobs; empty while it does."""
        with self._lock:
            is_resting = (self._clock() - self._opened_at) % (REST_SECONDS + TRIAL_SECONDS) < REST_SECONDS
            return self._sentence() if self._is_open and is_resting else ""

    def refuse(self, webhook_id: str, status: int) -> None:
        """The backend answered `status` to an end."""
        with self._lock:
            is_new = webhook_id not in self._refused
            was_open = self._is_open
            self._refused.add(webhook_id)
            self._status = status
            self._is_open = was_open or len(self._refused) >= REFUSED_ENDS
            if is_new and self._is_open:
                # An end that was refused before is no news, and must not put off the next trial.
                self._opened_at = self._clock()
        if self._is_open and not was_open:
            log_event(logger, "breaker open", logging.ERROR, part="the backend", reason=self.reason)

    def accept(self) -> None:
        """The backend took an end."""
        with self._lock:
            was_open, self._is_open = self._is_open, False
            self._refused.clear()
        if was_open:
            log_event(logger, "breaker closed", part="the backend")

    def _sentence(self) -> str:
        said = f"HTTP {self._status} to {len(self._refused)} ends in a row, none taken"
        return f"the backend refuses this worker: {said}; {meaning_of(self._status)}"
