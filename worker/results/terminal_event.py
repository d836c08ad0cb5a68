"""The terminal event of a job, which is what its record in the ledger holds."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from clients.webhooks import Webhook, WebhookKind
from config.redacting import redacted
from worker.errors import ErrorCode
from worker.messages.generation_id import GenerationId, is_generation_id
from worker.messages.webhook_bodies import FailedBody
from worker.outcome import Outcome
from worker.strict_json import is_number, strict_json
from worker.tracing.context import NO_TRACE, TRACEPARENT, TRACESTATE, TraceContext


@dataclass(frozen=True, slots=True)
class TerminalEvent:
    """How a job ended: `complete` or `failed`, and the exact body of the webhook.

    `began_at` and `ended_at` (epoch seconds: delivered to the worker, ready to be recorded), `stages` (name, seconds
    since `began_at`, seconds) and `attempt` say where the time went; they stay in the record. `fingerprint` is that of
    the message it answers, see `worker.messages.identity`. `is_recorded` is False only in the outbox, before its record
    is stored: until then it must not be sent. `traceparent` and `tracestate` are the job's trace context, which the
    webhook passes on. One that was written before a field existed has its default.
    """

    task_id: str
    generation_id: GenerationId
    kind: WebhookKind
    body: Mapping[str, Any]
    began_at: float = 0.0
    stages: tuple[tuple[str, float, float], ...] = ()
    worker: str = ""
    is_delivered: bool = False
    attempt: int = 1
    ended_at: float = 0.0
    fingerprint: str = ""
    is_recorded: bool = True
    traceparent: str = ""
    tracestate: str = ""

    @property
    def webhook(self) -> Webhook:
        """The webhook. Its id never changes, so a backend can deduplicate."""
        # Read again: a record is in a bucket that others may write to.
        trace = TraceContext.from_headers({TRACEPARENT: self.traceparent, TRACESTATE: self.tracestate})
        return Webhook(
            kind=self.kind, webhook_id=f"{self.task_id}:{self.kind.value}", body=self.body, trace_headers=trace.headers
        )

    @property
    def outcome(self) -> Outcome:
        """`complete`, `failed` or, of a job that was asked to end, `cancelled`: to a backend that is `failed` too."""
        is_cancelled = self.body.get("error_code") == ErrorCode.CANCELLED
        return Outcome.CANCELLED if is_cancelled else Outcome(self.kind.value)

    def to_json(self) -> bytes:
        """Encode the record."""
        fields = {name: getattr(self, name) for name in self.__slots__} | {"kind": self.kind.value}
        return json.dumps(fields, sort_keys=True).encode()

    @classmethod
    def from_json(cls, content: bytes) -> Self:
        """Decode a record; raise `ValueError` where `content` is no terminal event that could be sent."""
        try:
            fields = strict_json(content)
            stages = tuple((name, start, seconds) for name, start, seconds in fields.pop("stages"))
            # Workers of several versions share a bucket during an upgrade: fields that a newer one added are left out.
            known = {name: value for name, value in fields.items() if name in cls.__slots__}
            event = cls(**known | {"kind": WebhookKind(known["kind"]), "stages": stages})
            # Encoded here, so that it does not fail on the thread that sends it.
            _ = event.webhook.payload
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a terminal event: {error}") from error
        if event.kind is WebhookKind.PROGRESS:
            raise ValueError("not a terminal event: progress ends no job")
        if not (
            isinstance(event.task_id, str) and is_generation_id(event.generation_id) and isinstance(event.body, dict)
        ):
            raise ValueError("not a terminal event: an id or the body is of a wrong kind")
        _check_types(event)
        return event


def _check_types(event: TerminalEvent) -> None:
    """Raise `ValueError` where a field holds what no worker writes there."""
    is_sound = (
        event.body.get("generation_id") == event.generation_id
        and all(is_number(value) for value in (event.began_at, event.ended_at))
        and all(isinstance(name, str) and is_number(at) and is_number(took) for name, at, took in event.stages)
        and all(
            isinstance(text, str) for text in (event.worker, event.fingerprint, event.traceparent, event.tracestate)
        )
        and all(isinstance(flag, bool) for flag in (event.is_delivered, event.is_recorded))
        and type(event.attempt) is int
    )
    if not is_sound:
        raise ValueError("not a terminal event: a field is of a wrong type, or the body is another generation's")


def failed_event(
    *,
    task_id: str,
    generation_id: GenerationId,
    code: ErrorCode,
    message: str,
    retry_count: int,
    worker: str = "",
    began_at: float = 0.0,
    stages: tuple[tuple[str, float, float], ...] = (),
    ended_at: float = 0.0,
    fingerprint: str = "",
    trace: TraceContext = NO_TRACE,
) -> TerminalEvent:
    """Build the event of a failed job."""
    body: FailedBody = {
        "generation_id": generation_id,
        "error_message": redacted(message),
        "error_code": code,
        "retry_count": retry_count,
    }
    return TerminalEvent(
        task_id,
        generation_id,
        WebhookKind.FAILED,
        body,
        began_at,
        stages,
        worker,
        attempt=retry_count + 1,
        ended_at=ended_at,
        fingerprint=fingerprint,
        traceparent=trace.traceparent,
        tracestate=trace.tracestate,
    )
