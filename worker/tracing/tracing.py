"""The seam between the worker and OpenTelemetry: without it, a message's trace context is only passed on."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from clients.webhooks import WebhookClient
from config.backend import BackendSettings
from worker.outcome import Outcome
from worker.tracing.context import TraceContext


@dataclass(frozen=True, slots=True)
class JobAttempt:
    """An attempt at a job, as it begins.

    `queue` delivered its message, which has `message_bytes` and the context `trace`, at `began_at` in epoch seconds.
    `now` returns the current time counted from then: the wall clock may be set meanwhile.
    """

    queue: str
    task_id: str
    generation_id: int | str
    number: int
    message_bytes: int
    trace: TraceContext
    began_at: float
    now: Callable[[], float]


@dataclass(frozen=True, slots=True)
class AttemptEnd:
    """How it ended. `stages` are name, seconds since it began, and seconds."""

    stages: Sequence[tuple[str, float, float]]
    outcome: Outcome
    code: str = ""
    num_steps: int = 0


class JobSpan:
    """The span of an attempt at a job. `trace` is what its webhooks and its copies are told."""

    def __init__(self, trace: TraceContext) -> None:
        self.trace = trace

    @property
    def log_fields(self) -> dict[str, Any]:
        """What the log's lines of the attempt say of it."""
        return {}

    def settling(self) -> AbstractContextManager[None]:
        """Return a block in which the attempt's deliveries are settled."""
        return nullcontext()

    def end(self, end: AttemptEnd) -> None:
        """End the span and record its stages as spans below it."""


class Tracing:
    """Records nothing."""

    def begin(self, attempt: JobAttempt) -> JobSpan:
        """Begin the span of an attempt at a job."""
        return JobSpan(attempt.trace)

    def webhook_client(self, settings: BackendSettings) -> WebhookClient:
        """Return a client that records its calls."""
        return WebhookClient(settings)

    def close(self) -> None:
        """Export what is recorded, within a few seconds."""
