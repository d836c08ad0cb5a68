"""A request not yet answered, and its future."""

from concurrent.futures import Future
from dataclasses import dataclass, field

from inference.request import GenerationRequest, GenerationResult, IsCancelled, OnStep


@dataclass(eq=False, slots=True)
class Pending:
    """One request on its way. Its future belongs to one thread, but for `cancel`, which is anybody's at any time."""

    request: GenerationRequest
    on_step: OnStep
    is_cancelled: IsCancelled
    future: Future[GenerationResult] = field(default_factory=Future)
    is_cancel_sent: bool = False
    _is_begun: bool | None = None  # False: withdrawn before

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
        """From the first call on `future.cancel()` does nothing; False if it was used before."""
        if self._is_begun is None:
            self._is_begun = self.future.set_running_or_notify_cancel()
        return self._is_begun

    def finish(self, result: GenerationResult) -> None:
        """Answer it; no word of it where the future was cancelled."""
        if self.begin():
            self.future.set_result(result)

    def fail(self, error: Exception) -> None:
        """As `finish`."""
        if self.begin():
            self.future.set_exception(error)
