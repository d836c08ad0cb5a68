"""Requests that are not answered yet: each with its future, all of them with their place in the quarantine."""

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field

from inference.errors import EngineClosed, RequestCancelled
from inference.process.child_handle import ChildHandle
from inference.process.protocol import Cancel, Generate
from inference.process.quarantine import Quarantine
from inference.request import GenerationRequest, GenerationResult, IsCancelled, OnStep, StepReport


@dataclass(eq=False, slots=True)
class Pending:
    """One unanswered request. One thread resolves its future; any thread may cancel it at any time."""

    request: GenerationRequest
    on_step: OnStep
    is_cancelled: IsCancelled
    future: Future[GenerationResult] = field(default_factory=Future)
    is_cancel_sent: bool = False
    _is_begun: bool | None = None  # False: cancelled before it began

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def arrived_at(self) -> float:
        return self.request.arrived_at

    @property
    def is_unwanted(self) -> bool:
        return self.future.cancelled() or self.is_cancelled()

    def begin(self) -> bool:
        """Make `future.cancel()` ineffective from the first call on; False if the future was cancelled before."""
        if self._is_begun is None:
            self._is_begun = self.future.set_running_or_notify_cancel()
        return self._is_begun

    def finish(self, result: GenerationResult) -> None:
        """Resolve the future with `result`, unless it was cancelled."""
        if self.begin():
            self.future.set_result(result)

    def fail(self, error: Exception) -> None:
        """Resolve the future with `error`, unless it was cancelled."""
        if self.begin():
            self.future.set_exception(error)


class PendingRequests:
    """Owner of every unanswered request. `add` and `refuse` are thread-safe; the owner thread alone calls the rest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._new: list[Pending] = []
        self._refusal: str | None = None
        self._quarantine: Quarantine[Pending] = Quarantine()

    @property
    def inside(self) -> tuple[Pending, ...]:
        """The requests that the child has."""
        return self._quarantine.inside

    def add(self, pending: Pending) -> None:
        """Queue a request; raise `EngineClosed` after `refuse`."""
        with self._lock:
            if self._refusal is not None:
                raise EngineClosed(self._refusal)
            self._new.append(pending)

    def refuse(self, reason: str) -> None:
        """Have `add` raise `EngineClosed` with `reason` from now on."""
        with self._lock:
            self._refusal = reason

    def take_new(self) -> None:
        """Move the requests that were added into the quarantine."""
        with self._lock:
            new, self._new = self._new, []
        for pending in new:
            self._quarantine.add(pending)

    def pass_on_cancels(self, child: ChildHandle) -> None:
        """End the cancelled requests that the child does not have, and cancel those that it has."""
        for pending in self._quarantine.outside:
            if pending.is_unwanted:
                self._quarantine.remove(pending)
                pending.fail(RequestCancelled("cancelled while it waited"))
        for pending in self.inside:
            if not pending.is_cancel_sent and pending.is_unwanted:
                pending.is_cancel_sent = True
                child.send(Cancel(pending.request_id))

    def send_next(self, child: ChildHandle) -> None:
        """Send the requests that may be in the child together."""
        for pending in self._quarantine.next_to_send():
            child.send(Generate(pending.request))

    def report(self, request_id: str, report: StepReport) -> None:
        """Pass a step report on, unless the request was cancelled before it began."""
        pending = self._quarantine.find(request_id)
        if pending is not None and pending.begin():
            pending.on_step(report)

    def pop(self, request_id: str) -> Pending:
        """Remove and return the request that the child has answered."""
        pending = self._quarantine.find(request_id)
        assert pending is not None, "the child answered a request that was not sent to it"  # noqa: S101
        self._quarantine.remove(pending)
        return pending

    def on_crash(self, *, is_killed: bool) -> Pending | None:
        """See `Quarantine.on_crash`."""
        return self._quarantine.on_crash(is_killed=is_killed)

    def on_restart(self) -> None:
        """See `Quarantine.on_restart`."""
        self._quarantine.on_restart()

    def fail_all(self, reason: str) -> None:
        """End every request with `EngineClosed`."""
        self.take_new()
        for pending in (*self.inside, *self._quarantine.outside):
            pending.fail(EngineClosed(reason))
