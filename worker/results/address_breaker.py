"""The circuit breaker for wrong backend addresses, which reject every event whatever is in it.

A single event that is answered 400 or 404 is a dead letter. Several in a row, with none accepted between, mean a host
that Django's ALLOWED_HOSTS lacks, a path twice in the address, or a redirect: the results of more jobs would be lost.
"""

import logging
import threading
import time
from collections.abc import Callable

from clients.webhooks import DEFAULT_SETTING
from config.logs import log_event

logger = logging.getLogger(__name__)

# Different events, however often each was sent. Three generations deleted while they run are not rare, and each further
# event is another image: those rejected before the breaker opens are dead letters, which an operator must replay.
REFUSALS_TO_OPEN = 5
# No jobs are taken for so long, then some for a trial: only a new event can show that the old ones were at fault.
REST_SECONDS = 300.0
TRIAL_SECONDS = 30.0

MEANINGS = {
    400: "Django answers so to a host that its ALLOWED_HOSTS does not name",
    404: "there is nothing at that address: look at the path in {setting}",
    405: "another service than the backend may listen there, or {setting} has a wrong path",
    410: "the address was given up: look at {setting}",
    421: "the server does not serve this host: look at {setting}",
    426: "the server wants another protocol: should {setting} begin with https?",
}
PATH_TWICE = "/api/webhooks/inference/… is added to BACKEND_API_URL: is a part of that path in it already?"
# Statuses that a wrong address may answer to every request. 409, 413 and 422 concern one event.
ADDRESS_STATUSES = frozenset({*MEANINGS, *range(300, 400), 402, 406, 415, 451})


def explain_status(status: int, setting: str = DEFAULT_SETTING) -> str:
    """Return what to check where a backend answers `status` to every request; `setting` says where it is."""
    if 300 <= status < 400:
        return f"a redirect is never followed: set {setting} to the final address"
    if status == 404 and setting == DEFAULT_SETTING:
        return PATH_TWICE
    return MEANINGS.get(status, "look at {setting} and at the backend's log").format(setting=setting)


class AddressBreaker:
    """Open at an address once it rejected `REFUSALS_TO_OPEN` different events in a row, until it accepts one.

    Thread-safe. Addresses are known by the settings that name them. While the breaker is open at one, a rejection there
    concerns the address and not the event; what another accepts is no evidence on it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._refused: dict[str, set[str]] = {}
        self._statuses: dict[str, int] = {}
        # One for all addresses: with a rhythm each, two that are open might never have a trial together.
        self._resting_since = 0.0

    @property
    def reason(self) -> str:
        """Why the worker takes no jobs; empty while it takes them."""
        with self._lock:
            is_resting = (self._clock() - self._resting_since) % (REST_SECONDS + TRIAL_SECONDS) < REST_SECONDS
            open_at = [setting for setting in self._refused if self._is_open(setting)]
            if not open_at or not is_resting:
                return ""
            return f"the backend refuses this worker: {'; '.join(map(self._explain, open_at))}"

    def is_open(self, setting: str = DEFAULT_SETTING) -> bool:
        """Return whether the breaker is open at the address that `setting` names."""
        with self._lock:
            return self._is_open(setting)

    def refuse(self, webhook_id: str, status: int, setting: str = DEFAULT_SETTING) -> None:
        """Count an event that the backend answered with `status`, at the address that `setting` names."""
        with self._lock:
            was_open = self._is_open(setting)
            refused = self._refused.setdefault(setting, set())
            is_new = webhook_id not in refused
            refused.add(webhook_id)
            self._statuses[setting] = status
            is_open = self._is_open(setting)
            if is_new and is_open:
                # A repeated rejection must not postpone the next trial.
                self._resting_since = self._clock()
        if is_open and not was_open:
            log_event(logger, "breaker open", logging.ERROR, part="the backend", reason=self.reason)

    def accept(self, setting: str = DEFAULT_SETTING) -> None:
        """Close at the address that `setting` names: it accepted an event."""
        with self._lock:
            was_open = self._is_open(setting)
            self._refused.pop(setting, None)
        if was_open:
            log_event(logger, "breaker closed", part="the backend", setting=setting)

    def _is_open(self, setting: str) -> bool:
        return len(self._refused.get(setting, ())) >= REFUSALS_TO_OPEN

    def _explain(self, setting: str) -> str:
        status = self._statuses[setting]
        answers = f"HTTP {status} to {len(self._refused[setting])} ends in a row at {setting}, none taken"
        return f"{answers}; {explain_status(status, setting)}"
