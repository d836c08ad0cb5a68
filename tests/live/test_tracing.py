"""One trace from the publisher's span to the backend's, through whole workers, read back from a collector.

Publisher and backend make their spans with OpenTelemetry's SDK, as theirs do in the field.
"""

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pika
import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import SpanKind, format_span_id, format_trace_id
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from examples.parts.backend import Backend, Call
from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.station import start_light_worker
from tests.support.servers.collector import TRACES_PATH, Collector, Received, running_collector
from tests.support.world import Worker, World, eventually, new_world

SECRET_WORDS = "a fox that nobody may read of"
# Of the first worker: a job with all steps that it may have takes fifteen seconds.
STEP_SECONDS, MAX_STEPS = 0.1, 150
w3c = TraceContextTextMapPropagator()


@dataclass(frozen=True)
class Traced:
    """A message as its publisher traces it: its headers, and the ids of the span that published it."""

    headers: dict[str, str]
    trace_id: str
    span_id: str


class Site:
    """A world whose publisher, worker and backend export to one collector."""

    def __init__(self, world: World, collector: Collector) -> None:
        self.world, self.collector = world, collector
        self.publisher, self.backend = (_provider(name, collector) for name in ("shop", "backend"))

    def start_worker(self, *, delay_ms: int = 50, **constants: Any) -> Worker:
        """Start a worker that exports its spans every `delay_ms`."""
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": self.collector.url, "OTEL_BSP_SCHEDULE_DELAY": str(delay_ms)}
        return start_light_worker(self.world, constants=constants, **variables)

    def publish(self, body: bytes) -> Traced:
        headers: dict[str, str] = {}
        tracer = self.publisher.get_tracer("shop")
        with tracer.start_as_current_span(f"send {self.world.queue}", kind=SpanKind.PRODUCER) as span:
            w3c.inject(headers)
            self.world.publish_raw(body, properties=pika.BasicProperties(delivery_mode=2, headers=headers))
        context = span.get_span_context()
        return Traced(headers, format_trace_id(context.trace_id), format_span_id(context.span_id))

    def publish_job(self, generation_id: int, **fields: Any) -> Traced:
        data = {"generation_id": generation_id, "prompt": SECRET_WORDS, "num_inference_steps": 8} | fields
        message = {"task_id": str(uuid.uuid4()), "type": "image_generation", "data": data}
        return self.publish(json.dumps(message).encode())

    def note_call(self, call: Call) -> None:
        """Trace the backend's handling of a webhook."""
        tracer = self.backend.get_tracer("backend")
        tracer.start_span(f"receive {call.kind}", w3c.extract(call.headers), SpanKind.SERVER).end()

    def spans(self, traced: Traced, *names: str) -> list[Received]:
        """Return the spans of a trace, once there are some of all these names."""

        def are_here() -> bool:
            return set(names) <= {span.name for span in self.collector.spans(traced.trace_id)}

        eventually(are_here, lambda: repr([span.name for span in self.collector.spans(traced.trace_id)]))
        return self.collector.spans(traced.trace_id)


def _provider(name: str, collector: Collector) -> TracerProvider:
    provider = TracerProvider(resource=Resource({"service.name": name}))
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(collector.url + TRACES_PATH)))
    return provider


@pytest.fixture(scope="module")
def site(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_collector() as collector, new_world(rabbitmq, s3_server, tmp_path_factory.mktemp("world")) as world:
        made = Site(world, collector)
        world.backend.stop()
        with Backend(token=world.backend.token, on_call=made.note_call) as world.backend:
            made.start_worker(**{"tests.support.engine.fake_child:TURN_SECONDS": STEP_SECONDS})
            yield made


def only(spans: list[Received], name: str) -> Received:
    (found,) = (span for span in spans if span.name == name)
    return found


def test_a_job_is_one_trace_from_its_publisher_to_its_backend(site: Site) -> None:
    traced = site.publish_job(1)
    site.world.wait_for_end(1)

    process, settle = (f"{verb} {site.world.queue}" for verb in ("process", "settle"))
    spans = site.spans(traced, process, settle, "receive complete")
    job, published = only(spans, process), only(spans, f"send {site.world.queue}")
    assert {span.service["service.name"] for span in spans} == {"shop", "darkroom", "backend"}
    assert (published.parent_id, job.parent_id) == ("", published.span_id)
    assert job.links == [(traced.trace_id, published.span_id)]
    stages = [span for span in spans if span.parent_id == job.span_id and span.kind == "INTERNAL"]
    named = ["ledger", "fetch", "wait", "adapt", "encode", "denoise", "decode", "sign", "store", "record", "notify"]
    assert sorted(span.name for span in stages) == sorted(named)
    calls = [span for span in spans if span.kind == "CLIENT" and span.name in ("POST", "PATCH")]
    *progress, complete = [call.attributes["darkroom.webhook.kind"] for call in calls]
    assert (set(progress), complete) == ({"progress"}, "complete")
    assert {call.parent_id for call in calls} == {job.span_id}
    assert only(spans, settle).parent_id == job.span_id
    received = only(spans, "receive complete")
    assert (received.kind, received.parent_id) == ("SERVER", calls[-1].span_id)
    assert all(job.began_at <= span.began_at <= span.ended_at <= job.ended_at for span in (*stages, *calls))
    assert SECRET_WORDS not in repr(spans)
    assert site.world.backend.token not in repr(spans)


def test_the_times_of_the_stages_are_those_of_the_jobs_log_line(site: Site) -> None:
    traced = site.publish_job(2)
    site.world.wait_for_end(2)

    spans, worker = site.spans(traced, f"process {site.world.queue}"), site.world.workers[0]
    (line,) = (one for one in worker.events("job out") if one["generation_id"] == 2)
    job = only(spans, f"process {site.world.queue}")
    assert (line["trace_id"], line["span_id"]) == (traced.trace_id, job.span_id)
    for name, seconds in line["stages"].items():
        span = only(spans, name)
        assert (span.ended_at - span.began_at) / 1e9 == pytest.approx(seconds, abs=0.001)


def test_a_failed_job_is_an_error_with_its_code(site: Site) -> None:
    traced = site.publish_job(3, lora_path="models/nobody.safetensors")
    site.world.wait_for_end(3)

    spans = site.spans(traced, f"process {site.world.queue}", "receive failed")
    job = only(spans, f"process {site.world.queue}")
    assert (job.status, job.status_message, job.attributes["error.type"]) == ("ERROR", *["LORA_NOT_FOUND"] * 2)
    assert site.world.workers[0].metric("darkroom_jobs_total", outcome="failed", code="LORA_NOT_FOUND") == 1


def test_a_dead_letter_keeps_the_headers_of_its_trace(site: Site) -> None:
    traced = site.publish(b"no job")
    site.world.wait_until_clean(dead=1)

    connection = pika.BlockingConnection(pika.URLParameters(site.world.rabbitmq.url))
    _, properties, _ = connection.channel().basic_get(f"{site.world.queue}.dead", auto_ack=True)
    connection.close()
    assert properties.headers["traceparent"] == traced.headers["traceparent"]


def test_another_attempt_after_a_killed_worker_is_in_the_same_trace(site: Site) -> None:
    traced = site.publish_job(4, num_inference_steps=MAX_STEPS)
    site.world.wait_for_step(4)

    site.world.workers[0].kill()
    site.start_worker()
    site.world.wait_for_end(4)

    recovered = f"process {site.world.queue}.recover"
    spans = site.spans(traced, recovered, "receive complete")
    assert only(spans, recovered).parent_id == traced.span_id
    calls = {span.span_id for span in spans if span.parent_id == only(spans, recovered).span_id}
    assert only(spans, "receive complete").parent_id in calls


def test_a_worker_that_stops_exports_what_it_has(site: Site) -> None:
    worker = site.start_worker(delay_ms=3_600_000)
    for other in site.world.workers[:-1]:
        other.kill()
    traced = site.publish_job(5)
    site.world.wait_for_end(5)
    site.world.wait_until_clean()

    assert worker.terminate() == 0

    process = only(site.collector.spans(traced.trace_id), f"process {site.world.queue}")
    assert process.attributes["darkroom.outcome"] == "complete"
