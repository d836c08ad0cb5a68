"""A small OpenTelemetry collector: takes OTLP over HTTP as protobuf messages, and keeps the spans."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

TRACES_PATH = "/v1/traces"


@dataclass(frozen=True)
class Received:
    """A span as it arrived: ids in hex digits, times in nanoseconds, kind and status by their names in the protocol."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    began_at: int
    ended_at: int
    attributes: dict[str, Any]
    status: str
    status_message: str
    links: list[tuple[str, str]]
    service: dict[str, Any]


class Collector:
    """Owner of the server's socket. `refusals` is how many requests are answered with 503 before one is taken."""

    def __init__(self) -> None:
        self.refusals = 0
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self._received: list[Received] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def spans(self, trace_id: str | None = None) -> list[Received]:
        """Return the spans, or those of one trace, in the order of their start, the longer first."""
        with self._lock:
            found = [span for span in self._received if trace_id in (None, span.trace_id)]
        return sorted(found, key=lambda span: (span.began_at, -span.ended_at))

    def take(self, path: str, headers: dict[str, str], content: bytes) -> int:
        """Keep the spans of a request; return the status it is answered with."""
        request = ExportTraceServiceRequest.FromString(content)
        with self._lock:
            self.paths.append(path)
            self.headers.append(headers)
            if self.refusals:
                self.refusals -= 1
                return 503
            for of_resource in request.resource_spans:
                service = _plain(of_resource.resource.attributes)
                for of_scope in of_resource.scope_spans:
                    self._received += [_received(span, service) for span in of_scope.spans]
        return 200 if path == TRACES_PATH else 404

    def serve(self) -> None:
        """Serve until `close`."""
        self._server.serve_forever(0.02)

    def close(self) -> None:
        """Refuse connections from now on."""
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def running_collector() -> Iterator[Collector]:
    """Serve a collector on a free port."""
    collector = Collector()
    threading.Thread(target=collector.serve, name="collector", daemon=True).start()
    try:
        yield collector
    finally:
        collector.close()


def _handler_of(collector: Collector) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(collector.take(self.path, headers, content))
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            """Write nothing."""

    return Handler


def _received(span: Span, service: dict[str, Any]) -> Received:
    return Received(
        span.name,
        Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        _plain(span.attributes),
        Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_"),
        span.status.message,
        [(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
        service,
    )


def _plain(attributes: Any) -> dict[str, Any]:
    pairs: list[KeyValue] = list(attributes)
    return {pair.key: getattr(pair.value, str(pair.value.WhichOneof("value"))) for pair in pairs}
