"""Which requests go to the engine's process, and which one crashed it. Pure: no thread, no pipe, no clock."""

from typing import Generic, Protocol, TypeVar

# One death under a request that was alone may be bad luck. A kill comes from outside, from an operator or from the
# kernel where memory ends: it weighs half, so that innocents outlive a storm of them.
CRASH_WEIGHT, KILL_WEIGHT = 2, 1
POISON_WEIGHT = 4


class QueuedRequest(Protocol):
    """What the lineup must know of a request."""

    @property
    def request_id(self) -> str: ...
    @property
    def arrived_at(self) -> float: ...


R = TypeVar("R", bound=QueuedRequest)


class Quarantine(Generic[R]):
    """Owner of the place of each unanswered request: waiting, inside the process, or a suspect that waits to be tried.

    Requests are inside all together. When the process dies under several of them they are suspects, and are inside one
    at a time with nothing beside them, until each was answered or one is convicted: by two deaths of the process, or
    four kills, with nothing else inside. The rest are then innocent, and go together again with all that wait.
    """

    def __init__(self) -> None:
        self._waiting: list[R] = []
        self._suspects: list[R] = []  # the next to be tried first
        self._inside: dict[str, R] = {}  # in the order they were sent
        self._is_trial = False
        self._weights: dict[R, int] = {}  # against those under whom the process died while they were alone

    @property
    def inside(self) -> tuple[R, ...]:
        return tuple(self._inside.values())

    @property
    def outside(self) -> tuple[R, ...]:
        return (*self._suspects, *self._waiting)

    def add(self, request: R) -> None:
        """Let a new request wait."""
        self._waiting.append(request)

    def find(self, request_id: str) -> R | None:
        """The request of that id, if it is inside."""
        return self._inside.get(request_id)

    def next_to_send(self) -> list[R]:
        """Those to be sent now, in this order; from here on they count as inside."""
        if self._is_trial and self._inside:
            return []
        self._is_trial = bool(self._suspects)
        taken = [self._suspects.pop(0)] if self._is_trial else self._take_waiting()
        self._inside |= {request.request_id: request for request in taken}
        return taken

    def remove(self, request: R) -> None:
        """It is answered, wherever it was."""
        if self._inside.get(request.request_id) is request:
            del self._inside[request.request_id]
        else:
            (self._suspects if request in self._suspects else self._waiting).remove(request)
        self._weights.pop(request, None)

    def on_crash(self, *, is_killed: bool = False) -> R | None:
        """The process died or was killed. Return the culprit, if this convicts one: it is here no more."""
        victims = self._empty()
        if len(victims) == 1:
            return self._blame_alone(victims[0], KILL_WEIGHT if is_killed else CRASH_WEIGHT)
        # What went well for long is the least suspect: the newest first. None inside: none crashed it.
        self._suspects = victims[::-1] + self._suspects
        return None

    def on_restart(self) -> None:
        """The process was ended for a reason of its own: who was inside goes back to where they came from."""
        victims = self._empty()
        if self._is_trial:
            self._suspects = victims + self._suspects
        else:
            self._waiting = victims + self._waiting

    def _take_waiting(self) -> list[R]:
        """All that wait, oldest first, but no two of one id: answers are told apart by it."""
        taken: dict[str, R] = {}
        for request in sorted(self._waiting, key=lambda one: one.arrived_at):
            if request.request_id not in self._inside:
                taken.setdefault(request.request_id, request)
        self._waiting = [request for request in self._waiting if taken.get(request.request_id) is not request]
        return list(taken.values())

    def _empty(self) -> list[R]:
        victims = list(self._inside.values())
        self._inside.clear()
        return victims

    def _blame_alone(self, victim: R, weight: int) -> R | None:
        self._weights[victim] = self._weights.get(victim, 0) + weight
        if self._weights[victim] < POISON_WEIGHT:
            self._suspects.insert(0, victim)
            return None
        del self._weights[victim]
        self._waiting = self._suspects[::-1] + self._waiting
        self._suspects = []
        return victim
