"""Health and metrics over HTTP: `/health/live`, `/health/ready`, `/metrics`. Nothing else is answered."""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

REQUEST_TIMEOUT_SECONDS = 10.0


class HealthServer:
    """Owner of the HTTP port. `why_not_ready` gives the empty string once the worker takes jobs."""

    def __init__(self, port: int, registry: CollectorRegistry, why_not_ready: Callable[[], str]) -> None:
        handler = type("Handler", (_Handler,), {"registry": registry, "why_not_ready": staticmethod(why_not_ready)})
        self._server = ThreadingHTTPServer(("0.0.0.0", port), handler)
        self._server.daemon_threads = True
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
    registry: CollectorRegistry
    why_not_ready: Callable[[], str]

    timeout = REQUEST_TIMEOUT_SECONDS
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        match self.path.split("?")[0]:
            case "/health/live":
                self._answer(200, "live\n")
            case "/health/ready":
                reason = type(self).why_not_ready()
                self._answer(503 if reason else 200, f"{reason or 'ready'}\n")
            case "/metrics":
                self._answer(200, generate_latest(self.registry).decode(), CONTENT_TYPE_LATEST)
            case _:
                self._answer(404, "there are /health/live, /health/ready and /metrics\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Probes come every few seconds: they are not worth a line each."""

    def _answer(self, status: int, text: str, content_type: str = "text/plain; charset=utf-8") -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
