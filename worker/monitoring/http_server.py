"""HTTP server of health, metrics and the status page with its files and images; 404 for everything else."""

import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from worker.monitoring.assets import HEADERS, NAMES, StaticFile
from worker.monitoring.bounded_server import BoundedServer
from worker.monitoring.status import Status
from worker.progress.previews import JPEG

ADDRESSES = "/ (the status page), /status.json, /health/live, /health/ready and /metrics"
TEXT = "text/plain; charset=utf-8"


class HealthServer:
    """Owner of the HTTP port. `why_not_ready` returns the empty string once the worker takes jobs. The callables run on
    the request's own thread."""

    def __init__(
        self,
        port: int,
        registry: CollectorRegistry,
        why_not_ready: Callable[[], str],
        read_status: Callable[[], Status],
        read_image: Callable[[str], bytes | None],
    ) -> None:
        folder = files("worker.monitoring") / "page"
        given = {
            "registry": registry,
            "why_not_ready": staticmethod(why_not_ready),
            "read_status": staticmethod(read_status),
            "read_image": staticmethod(read_image),
            # Read once, so that an update cannot mix two versions.
            "page": {path: StaticFile((folder / name).read_bytes(), kind) for path, (name, kind) in NAMES.items()},
        }
        handler = type("Handler", (_Handler,), given)
        self._server = BoundedServer(("0.0.0.0", port), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: BoundedServer
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # by default an unreadable request gets an HTTP/0.9 response, without a status
    registry: CollectorRegistry
    why_not_ready: Callable[[], str]
    read_status: Callable[[], Status]
    read_image: Callable[[str], bytes | None]
    page: Mapping[str, StaticFile]

    def do_GET(self) -> None:
        match self.path.split("?")[0]:
            case "/health/live":
                self._answer(200, b"live\n")
            case "/health/ready":
                reason = type(self).why_not_ready()
                self._answer(503 if reason else 200, f"{reason or 'ready'}\n".encode())
            case "/metrics":
                self._answer(200, generate_latest(self.registry), CONTENT_TYPE_LATEST)
            case "/status.json":
                self._answer(200, type(self).read_status().to_json().encode(), "application/json", HEADERS)
            case path if path in self.page:
                self._answer(200, self.page[path].content, self.page[path].content_type, HEADERS)
            case path if (jpeg := type(self).read_image(path.removeprefix("/"))) is not None:
                self._answer(200, jpeg, JPEG, HEADERS)
            case _:
                self._answer(404, f"there are {ADDRESSES}\n".encode())

    def do_HEAD(self) -> None:
        self.do_GET()

    def handle_one_request(self) -> None:
        super().handle_one_request()
        self.server.restart_deadline(self.connection)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: probes come every few seconds."""

    def _answer(
        self, status: int, content: bytes, content_type: str = TEXT, headers: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        if "Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0":
            self.send_header("Connection", "close")  # the unread body must not be parsed as the next request
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
