"""Which requests go to the engine's process, and which one crashed it. Pure: no thread, no pipe, no clock."""

from typing import Generic, Protocol, TypeVar

# One crash under a request that was alone may be chance. A kill comes from outside, from an operator or from the kernel
# where memory ends: it weighs half, so that innocent requests survive a series of kills.
CRASH_WEIGHT, KILL_WEIGHT = 2, 1
POISON_WEIGHT = 4


class QueuedRequest(Protocol):
    """A request's identity and its place in the order of arrival."""

    @property
    def request_id(self) -> str: ...
    @property
    def arrived_at(self) -> float: ...


R = TypeVar("R", bound=QueuedRequest)


class Quarantine(Generic[R]):
    """Owner of the place of each unanswered request: waiting, inside the process, or a suspect to be isolated.

    Requests are inside all together. When the process crashes under several of them they are suspects, and are sent one
    at a time with no other inside, until each was answered or one is found to be poison: by two crashes of the process,
    or four kills, while it was alone. The remaining suspects then go together again with all that wait.
    """

    def __init__(self) -> None:
        self._waiting: list[R] = []
        self._suspects: list[R] = []  # in the order in which they are isolated
        self._inside: dict[str, R] = {}  # in the order they were sent
        self._is_isolating = False
        self._weights: dict[R, int] = {}  # of crashes while the request was alone

    @property
    def inside(self) -> tuple[R, ...]:
        return tuple(self._inside.values())

    @property
    def outside(self) -> tuple[R, ...]:
        return (*self._suspects, *self._waiting)

    def add(self, request: R) -> None:
        """Append a new request to the waiting ones."""
        self._waiting.append(request)

    def find(self, request_id: str) -> R | None:
        """Return the request with that id if it is inside."""
        return self._inside.get(request_id)

    def next_to_send(self) -> list[R]:
        """Move the requests that may be sent now inside, and return them in the order of sending."""
        if self._is_isolating and self._inside:
            return []
        self._is_isolating = bool(self._suspects)
        if self._is_isolating:
            first = self._suspects.pop(0)
            self._inside[first.request_id] = first
            return [first]
        # No two of one id: answers are matched by it.
        sent: dict[str, R] = {}
        for request in sorted(self._waiting, key=lambda one: one.arrived_at):
            if request.request_id not in self._inside:
                sent.setdefault(request.request_id, request)
        self._waiting = [request for request in self._waiting if sent.get(request.request_id) is not request]
        self._inside |= sent
        return list(sent.values())

    def remove(self, request: R) -> None:
        """Remove an answered or cancelled request from wherever it is."""
        if self._inside.get(request.request_id) is request:
            del self._inside[request.request_id]
        else:
            (self._suspects if request in self._suspects else self._waiting).remove(request)
        self._weights.pop(request, None)

    def on_crash(self, *, is_killed: bool = False) -> R | None:
        """Make suspects of the requests that were inside; remove and return the one found to be poison."""
        victims = self._empty()
        if len(victims) != 1:
            # The newest first: what ran without a crash for long is the least suspect. There may be none.
            self._suspects = victims[::-1] + self._suspects
            return None
        (victim,) = victims
        self._weights[victim] = self._weights.get(victim, 0) + (KILL_WEIGHT if is_killed else CRASH_WEIGHT)
        if self._weights[victim] < POISON_WEIGHT:
            self._suspects.insert(0, victim)
            return None
        del self._weights[victim]
        self._waiting = self._suspects[::-1] + self._waiting
        self._suspects = []
        return victim

    def on_restart(self) -> None:
        """Return the requests that were inside to where they came from: the process was replaced for its own fault."""
        victims = self._empty()
        if self._is_isolating:
            self._suspects = victims + self._suspects
        else:
            self._waiting = victims + self._waiting

    def _empty(self) -> list[R]:
        victims = list(self._inside.values())
        self._inside.clear()
        return victims
