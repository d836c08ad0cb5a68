"""A small real backend: takes the three webhook calls, keeps a journal of them, and fails as scripted."""

import hmac
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from examples.parts.part import Part
from examples.parts.ports import free_port

WEBHOOKS = {
    ("PATCH", "/api/webhooks/inference/progress"): "progress",
    ("POST", "/api/webhooks/inference/complete"): "complete",
    ("POST", "/api/webhooks/inference/failed"): "failed",
}
PATHS = frozenset(path for _, path in WEBHOOKS)
ENDS = ("complete", "failed")


@dataclass(frozen=True)
class Call:
    """One request as it arrived and the status it was answered with.

    `kind` is progress, complete or failed, or "METHOD /path" for what is no webhook. `headers` have lower-case names.
    `body` is empty where it was no JSON object. `received_at` is Unix time in seconds.
    """

    kind: str
    body: dict[str, Any]
    headers: dict[str, str]
    received_at: float
    status: int

    @property
    def generation_id(self) -> Any:
        return self.body.get("generation_id")

    @property
    def is_accepted(self) -> bool:
        return 200 <= self.status < 300


@dataclass
class _Answer:
    status: int
    num_left: int | None
    delay_seconds: float


class Backend(Part):
    """The backend of one test or demo; stopped it refuses connections, started again it has the same port.

    Every public method may be called from any thread. `on_call` runs on the thread of the request, before the answer.
    """

    host = "127.0.0.1"

    def __init__(self, *, token: str = "internal-token", on_call: Callable[[Call], None] | None = None) -> None:  # noqa: S107
        self.token = token
        self.port = free_port()
        self._on_call = on_call
        self._journal: list[Call] = []
        self._answers: dict[str, _Answer] = {}
        self._changed = threading.Condition()
        self._server: _Server | None = None

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def env(self) -> dict[str, str]:
        """Return the variables that point a worker here."""
        return {"BACKEND_API_URL": self.url, "INTERNAL_API_TOKEN": self.token}

    def start(self) -> None:
        """Listen; connections are accepted once this returns."""
        if self._server is None:
            self._server = _Server(self)
            threading.Thread(target=self._server.serve_forever, args=(0.02,), name="backend", daemon=True).start()

    def stop(self) -> None:
        """Refuse connections and cut the open ones. The journal and the scripted answers stay."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server.cut_connections()
            self._server = None

    def answer(self, kind: str, status: int, times: int | None = None, *, delay_seconds: float = 0.0) -> None:
        """Answer the next `times` calls of `kind`, or all from now on, with `status` after `delay_seconds`."""
        with self._changed:
            self._answers[kind] = _Answer(status, times, delay_seconds)

    def calls(self, kind: str | None = None, generation_id: Any = None) -> list[Call]:
        """Return the journal in order of arrival, or the part of it of one kind or one generation."""
        with self._changed:
            return [
                call
                for call in self._journal
                if kind in (None, call.kind) and generation_id in (None, call.generation_id)
            ]

    def ends(self, generation_id: Any) -> list[Call]:
        """Return the accepted final calls of a generation; one that is repeated under the same `webhook-id` counts
        once.
        """
        accepted = [call for call in self.calls(generation_id=generation_id) if call.kind in ENDS and call.is_accepted]
        return list({call.headers.get("webhook-id", id(call)): call for call in reversed(accepted)}.values())[::-1]

    def wait_for_end(self, generation_id: Any, timeout_seconds: float) -> Call:
        """Return the first accepted final call of a generation; raise `TimeoutError` where none comes in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.ends(generation_id), timeout_seconds):
                heard = [(call.kind, call.status) for call in self.calls(generation_id=generation_id)]
                raise TimeoutError(f"generation {generation_id}: no end in {timeout_seconds} s, only {heard}")
            return self.ends(generation_id)[0]

    def take(self, method: str, path: str, headers: dict[str, str], content: bytes) -> int:
        """Journal one request and return the status it is answered with."""
        received_at = time.time()
        kind = WEBHOOKS.get((method, path), f"{method} {path}")
        status, delay_seconds = self._answer_for(kind, headers)
        call = Call(kind, _json_object(content), headers, received_at, status)
        with self._changed:
            self._journal.append(call)
            self._changed.notify_all()

        if self._on_call is not None:
            self._on_call(call)
        time.sleep(delay_seconds)
        return status

    def _answer_for(self, kind: str, headers: dict[str, str]) -> tuple[int, float]:
        if not hmac.compare_digest(headers.get("authorization", "").encode(), f"Bearer {self.token}".encode()):
            return 401, 0.0
        if kind not in WEBHOOKS.values():
            return 405 if kind.partition(" ")[2] in PATHS else 404, 0.0
        with self._changed:
            answer = self._answers.get(kind)
            if answer is None or answer.num_left == 0:
                return 200, 0.0
            if answer.num_left is not None:
                answer.num_left -= 1
            return answer.status, answer.delay_seconds


class _Server(ThreadingHTTPServer):
    """Owns the listening socket and the open connections."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._open: set[socket.socket] = set()
        super().__init__((backend.host, backend.port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def cut_connections(self) -> None:
        for connection in tuple(self._open):
            self.shutdown_request(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore the error: tests kill clients in the middle of a call, and a traceback for each would fill the log."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # status line, headers and body leave in one packet
    disable_nagle_algorithm = True
    server: _Server

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        status = self.server.backend.take(self.command, self.path, headers, content)
        answer = json.dumps({"success": status < 300}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_PATCH = do_GET = do_PUT = do_DELETE = do_POST  # noqa: N815 - names the standard library looks for

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing: the journal is the log."""


def _json_object(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}
