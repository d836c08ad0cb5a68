"""Spans by OpenTelemetry's SDK, named by its semantic conventions. Imported only where tracing is on."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import (
    Link,
    Span,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    format_span_id,
    format_trace_id,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from clients.webhooks import DEADLINE_SECONDS, PORTS, Webhook, WebhookAttempt, WebhookClient, WebhookResult
from config.backend import BackendSettings
from worker.outcome import Outcome
from worker.tracing.context import TraceContext
from worker.tracing.exporting import LoggedExporter, SdkMessages
from worker.tracing.tracing import AttemptEnd, JobAttempt, JobSpan, Tracing
from worker.version import darkroom_version

# Of the grace period's reserve. A collector that does not answer must not delay the end of a worker longer.
CLOSE_SECONDS = 3.0
# Ends of an attempt that are errors. A cancelled or released one did what it was asked to.
ERRORS = frozenset({Outcome.FAILED, Outcome.RETRIED, Outcome.UNDECODABLE})

_w3c = TraceContextTextMapPropagator()


class OtelTracing(Tracing):
    """Owner of the SDK's tracer and of its exporting thread. The SDK reads its settings from the environment."""

    def __init__(self, *, worker: str) -> None:
        """Raises what the SDK raises for a variable of its own that is wrong."""
        messages = SdkMessages()
        messages.install()
        ours = {"service.name": "darkroom", "service.version": darkroom_version(), "service.instance.id": worker}
        # Attributes that are passed would win over those of OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME.
        resource = Resource.create(ours | dict(OTELResourceDetector().detect().attributes))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(LoggedExporter(OTLPSpanExporter(), messages)))
        self._tracer = self._provider.get_tracer("darkroom", darkroom_version())

    def begin(self, attempt: JobAttempt) -> JobSpan:
        """Begin a span below the publisher's, which it also links to, or the first one of a trace."""
        parent = _w3c.extract(attempt.trace.headers)
        publisher = get_current_span(parent).get_span_context()
        span = self._tracer.start_span(
            f"process {attempt.queue}",
            parent,
            SpanKind.CONSUMER,
            _message_attributes(attempt, "process") | {"darkroom.attempt": attempt.number},
            # The conventions correlate by links; the parent beside it is their option where a span has one message.
            links=[Link(publisher)] if publisher.is_valid else (),
            start_time=_nanoseconds(attempt.began_at),
        )
        return OtelJobSpan(self._tracer, span, attempt)

    def webhook_client(self, settings: BackendSettings) -> WebhookClient:
        """Return a client whose every call is a span."""
        return TracedWebhookClient(settings, self._tracer)

    def close(self) -> None:
        """Export what is recorded, unless that takes too long."""
        thread = threading.Thread(target=self._provider.shutdown, name="tracing-close", daemon=True)
        thread.start()
        thread.join(CLOSE_SECONDS)


class OtelJobSpan(JobSpan):
    """The recorded span of an attempt."""

    def __init__(self, tracer: Tracer, span: Span, attempt: JobAttempt) -> None:
        super().__init__(_trace_of(span))
        self._tracer = tracer
        self._span = span
        self._attempt = attempt

    @property
    def log_fields(self) -> dict[str, Any]:
        """The ids, by which a tracing backend finds the log's lines."""
        context = self._span.get_span_context()
        return {"trace_id": format_trace_id(context.trace_id), "span_id": format_span_id(context.span_id)}

    @contextmanager
    def settling(self) -> Iterator[None]:
        """Record the block as a span of its own."""
        began_at = self._attempt.now()
        try:
            yield
        finally:
            attributes = _message_attributes(self._attempt, "settle")
            self._record(f"settle {self._attempt.queue}", began_at, self._attempt.now(), attributes, SpanKind.CLIENT)

    def end(self, end: AttemptEnd) -> None:
        """End the span, and record each stage by the times that the job's record has too."""
        for name, start, seconds in end.stages:
            began_at = self._attempt.began_at + start
            self._record(name, began_at, began_at + seconds)
        self._span.set_attribute("darkroom.outcome", end.outcome.value)
        if end.num_steps:
            self._span.set_attribute("darkroom.steps", end.num_steps)
        if end.code:
            self._span.set_attribute("error.type", end.code)
        if end.outcome in ERRORS:
            self._span.set_status(Status(StatusCode.ERROR, end.code))
        self._span.end(_nanoseconds(self._attempt.now()))

    def _record(
        self,
        name: str,
        began_at: float,
        ended_at: float,
        attributes: dict[str, Any] | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> None:
        parent = set_span_in_context(self._span)
        span = self._tracer.start_span(name, parent, kind, attributes, start_time=_nanoseconds(began_at))
        span.end(_nanoseconds(ended_at))


class TracedWebhookClient(WebhookClient):
    """Sends each webhook in a span below the job's, with that span as the context for the backend."""

    def __init__(self, settings: BackendSettings, tracer: Tracer) -> None:
        super().__init__(settings)
        self._tracer = tracer

    def send(self, webhook: Webhook, *, deadline_seconds: float = DEADLINE_SECONDS) -> WebhookAttempt:
        """Make exactly one HTTP attempt, in a span."""
        route = self._routes[webhook.kind]
        span = self._tracer.start_span(
            route.method,
            _w3c.extract(webhook.trace_headers),
            SpanKind.CLIENT,
            _request_attributes(route.method, route.url) | {"darkroom.webhook.kind": webhook.kind.value},
        )
        try:
            traced = replace(webhook, trace_headers=_trace_of(span).headers)
            attempt = super().send(traced, deadline_seconds=deadline_seconds)
            _set_answer(span, attempt)
            return attempt
        finally:
            span.end()


def _message_attributes(attempt: JobAttempt, operation: str) -> dict[str, Any]:
    return {
        "messaging.system": "rabbitmq",
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
        # Of the default exchange, where routing key and queue are equal and stand for both.
        "messaging.destination.name": attempt.queue,
        "messaging.message.id": attempt.task_id,
        "messaging.message.body.size": attempt.message_bytes,
        "darkroom.generation_id": str(attempt.generation_id),
    }


def _request_attributes(method: str, url: str) -> dict[str, Any]:
    # Not the whole URL, although the conventions ask for it: an address may hold a token in its path or its query.
    parts = urlsplit(url)
    return {
        "http.request.method": method,
        "url.scheme": parts.scheme,
        "server.address": parts.hostname or "",
        "server.port": parts.port or PORTS.get(parts.scheme, 0),
    }


def _set_answer(span: Span, attempt: WebhookAttempt) -> None:
    if attempt.status is not None:
        span.set_attribute("http.response.status_code", attempt.status)
    if attempt.result is not WebhookResult.DELIVERED:
        span.set_attribute("error.type", str(attempt.status or "no_response"))
        span.set_status(Status(StatusCode.ERROR, attempt.reason))


def _trace_of(span: Span) -> TraceContext:
    headers: dict[str, str] = {}
    _w3c.inject(headers, set_span_in_context(span, Context()))
    return TraceContext(**headers)


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
