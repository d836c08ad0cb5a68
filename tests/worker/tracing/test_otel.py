"""What a collector gets of a job: spans by the conventions, with the times of its record and without its words."""

import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from clients.webhooks import Webhook, WebhookKind
from config.backend import BackendSettings
from examples.parts.backend import Backend
from examples.parts.ports import free_port
from tests.support.servers.collector import Collector, Received, running_collector
from tests.support.world import eventually
from worker.outcome import Outcome
from worker.tracing.context import NO_TRACE, TraceContext
from worker.tracing.exporting import LoggedExporter, SdkMessages, probe_collector
from worker.tracing.otel import OtelTracing
from worker.tracing.tracing import AttemptEnd, JobAttempt
from worker.version import darkroom_version

TRACE_ID, PUBLISHERS_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = TraceContext(f"00-{TRACE_ID}-{PUBLISHERS_ID}-01", "congo=t61rcWkgMzE")
BEGAN_AT = 1_700_000_000.0
STAGES = (("ledger", 0.0, 0.25), ("denoise", 0.5, 2.0), ("denoise", 2.5, 1.0))


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with running_collector() as made:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", made.url)
        yield made


def tracing() -> OtelTracing:
    return OtelTracing(worker="host:7")


def attempt(trace: TraceContext = SAMPLED, *, number: int = 1) -> JobAttempt:
    return JobAttempt(
        queue="image_generation",
        task_id="task",
        generation_id=456,
        number=number,
        message_bytes=321,
        trace=trace,
        began_at=BEGAN_AT,
        now=lambda: BEGAN_AT + 4,
    )


def by_name(spans: list[Received]) -> dict[str, Received]:
    return {span.name: span for span in spans}


def test_an_attempt_is_a_consumers_span_below_the_publishers_with_its_stages_and_its_settling(
    collector: Collector,
) -> None:
    traced = tracing()

    span = traced.begin(attempt(number=2))
    with span.settling():
        pass
    span.end(AttemptEnd(STAGES, Outcome.COMPLETE, num_steps=20))
    traced.close()

    spans = collector.spans(TRACE_ID)
    assert [one.name for one in spans] == [
        "process image_generation", "ledger", "denoise", "denoise", "settle image_generation"
    ]  # fmt: skip
    job, *stages, settled = spans
    assert (job.kind, job.parent_id, job.links) == ("CONSUMER", PUBLISHERS_ID, [(TRACE_ID, PUBLISHERS_ID)])
    message = {
        "messaging.system": "rabbitmq",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "image_generation",
        "messaging.message.id": "task",
        "messaging.message.body.size": 321,
        "darkroom.generation_id": "456",
    }
    assert job.attributes == message | {"darkroom.attempt": 2, "darkroom.outcome": "complete", "darkroom.steps": 20}
    assert job.status == "UNSET"
    assert {one.parent_id for one in (*stages, settled)} == {job.span_id}
    seconds = [((one.began_at - job.began_at) / 1e9, (one.ended_at - one.began_at) / 1e9) for one in stages]
    assert [(round(start, 6), round(took, 6)) for start, took in seconds] == [stage[1:] for stage in STAGES]
    assert (job.began_at, job.ended_at) == (BEGAN_AT * 1e9, (BEGAN_AT + 4) * 1e9)
    assert settled.kind == "CLIENT"
    assert settled.attributes == message | {"messaging.operation.name": "settle", "messaging.operation.type": "settle"}
    assert span.trace == TraceContext(f"00-{TRACE_ID}-{job.span_id}-01", SAMPLED.tracestate)
    assert span.log_fields == {"trace_id": TRACE_ID, "span_id": job.span_id}


@pytest.mark.parametrize(
    ("outcome", "code", "status"),
    [
        (Outcome.FAILED, "LORA_NOT_FOUND", "ERROR"),
        (Outcome.RETRIED, "STORAGE_UNAVAILABLE", "ERROR"),
        (Outcome.CANCELLED, "CANCELLED", "UNSET"),
        (Outcome.RELEASED, "", "UNSET"),
    ],
)
def test_an_attempt_that_failed_has_its_code(collector: Collector, outcome: Outcome, code: str, status: str) -> None:
    traced = tracing()

    traced.begin(attempt()).end(AttemptEnd((), outcome, code))
    traced.close()

    (job,) = collector.spans()
    assert (job.status, job.status_message) == (status, code if status == "ERROR" else "")
    assert job.attributes.get("error.type", "") == code
    assert job.attributes["darkroom.outcome"] == outcome


def test_a_job_without_a_context_begins_a_trace(collector: Collector) -> None:
    traced = tracing()

    span = traced.begin(attempt(NO_TRACE))
    span.end(AttemptEnd((), Outcome.COMPLETE))
    traced.close()

    (job,) = collector.spans()
    assert (job.parent_id, job.links) == ("", [])
    assert span.trace.traceparent.startswith(f"00-{job.trace_id}-{job.span_id}-")


def test_a_trace_that_its_publisher_did_not_sample_is_passed_on_and_not_recorded(collector: Collector) -> None:
    traced = tracing()

    span = traced.begin(attempt(TraceContext(f"00-{TRACE_ID}-{PUBLISHERS_ID}-00")))
    span.end(AttemptEnd(STAGES, Outcome.COMPLETE))
    traced.close()

    assert (span.trace.traceparent[:36], span.trace.traceparent[-3:]) == (f"00-{TRACE_ID}-", "-00")
    assert collector.spans() == []


def test_the_service_is_named_by_the_sdks_variables_else_darkroom(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tracing()
    plain.begin(attempt()).end(AttemptEnd((), Outcome.COMPLETE))
    plain.close()
    monkeypatch.setenv("OTEL_SERVICE_NAME", "pictures")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=staging,service.version=7")
    named = tracing()
    named.begin(attempt()).end(AttemptEnd((), Outcome.COMPLETE))
    named.close()

    first, second = (span.service for span in collector.spans())
    names = ("service.name", "service.version", "service.instance.id", "deployment.environment.name")
    assert [first.get(name) for name in names] == ["darkroom", darkroom_version(), "host:7", None]
    assert [second.get(name) for name in names] == ["pictures", "7", "host:7", "staging"]


def test_a_webhook_is_a_clients_span_and_the_backend_gets_it_as_its_parent(collector: Collector) -> None:
    traced = tracing()
    with Backend(token="token-of-the-backend") as backend:
        client = traced.webhook_client(BackendSettings(**backend.env()))  # type: ignore[arg-type]
        webhook = Webhook(WebhookKind.COMPLETE, "task:complete", {"generation_id": 456}, SAMPLED.headers)
        backend.answer("complete", 503, times=1)

        attempts = [client.send(webhook) for _ in range(2)]

        calls = backend.calls("complete")
    traced.close()
    assert [one.status for one in attempts] == [503, 200]
    refused, taken = collector.spans(TRACE_ID)
    assert [call.headers["traceparent"] for call in calls] == [
        f"00-{TRACE_ID}-{one.span_id}-01" for one in (refused, taken)
    ]
    assert {call.headers["tracestate"] for call in calls} == {SAMPLED.tracestate}
    assert (taken.name, taken.kind, taken.parent_id, taken.status) == ("POST", "CLIENT", PUBLISHERS_ID, "UNSET")
    assert taken.attributes == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "url.scheme": "http",
        "server.address": "127.0.0.1",
        "server.port": backend.port,
        "darkroom.webhook.kind": "complete",
    }
    assert (refused.status, refused.attributes["error.type"]) == ("ERROR", "503")
    assert "token-of-the-backend" not in repr(collector.spans())


def test_a_webhook_that_nobody_answers_is_an_error(collector: Collector) -> None:
    traced = tracing()
    settings = BackendSettings(BACKEND_API_URL=f"http://127.0.0.1:{free_port()}", INTERNAL_API_TOKEN="t")

    traced.webhook_client(settings).send(Webhook(WebhookKind.FAILED, "task:failed", {}, SAMPLED.headers))
    traced.close()

    (call,) = collector.spans()
    assert (call.status, call.attributes["error.type"]) == ("ERROR", "no_response")


def test_headers_for_the_collector_are_sent(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=a%20key")

    assert probe_collector() == ""

    assert (collector.paths, collector.headers[0]["api-key"]) == (["/v1/traces"], "a key")


# --- A collector that is away


class FailingExporter(SpanExporter):
    """Fails as often as it is told to, and logs as the SDK does."""

    def __init__(self, num_failures: int) -> None:
        self.num_failures = num_failures

    def export(self, spans: Any) -> SpanExportResult:
        if not self.num_failures:
            return SpanExportResult.SUCCESS
        self.num_failures -= 1
        logging.getLogger("opentelemetry.exporter").error("Failed to export batch code: %s", self.num_failures)
        return SpanExportResult.FAILURE


def test_an_outage_of_the_collector_is_one_line_and_its_end_another(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    messages, failing = SdkMessages(), FailingExporter(3)
    messages.install()
    exporter = LoggedExporter(failing, messages)
    spans: Any = [None, None]

    for _ in range(5):
        exporter.export(spans)
    failing.num_failures = 1
    exporter.export(spans)

    said = [(record.message, record.fields) for record in caplog.records]  # type: ignore[attr-defined]
    assert said == [
        ("tracing", {"reason": "Failed to export batch code: 2"}),
        ("traces exported again", {"num_spans_lost": 6}),
        ("tracing", {"reason": "Failed to export batch code: 0"}),
    ]
    assert not any(record.exc_info for record in caplog.records)


def test_no_job_waits_for_a_collector_that_takes_connections_and_never_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_exported, is_over = threading.Event(), threading.Event()

    class Silent(Collector):
        def take(self, path: str, headers: dict[str, str], content: bytes) -> int:
            is_exported.set()
            is_over.wait()
            return 200

    silent = Silent()
    threading.Thread(target=silent.serve, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", silent.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    traced = tracing()
    try:
        traced.begin(attempt()).end(AttemptEnd(STAGES, Outcome.COMPLETE))
        eventually(is_exported.is_set)
        # More than its queue of 2048 spans holds: the oldest are dropped.
        for _ in range(1000):
            traced.begin(attempt()).end(AttemptEnd(STAGES, Outcome.COMPLETE))
        traced.close()
        assert not is_over.is_set()
    finally:
        is_over.set()
        silent.close()
