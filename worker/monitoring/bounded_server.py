"""HTTP server with a bounded number of connections, each under a deadline."""

import logging
import socket
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

logger = logging.getLogger(__name__)

# A thread and a descriptor each. Probes, a Prometheus and a few browsers with the status page need a dozen.
MAX_CONNECTIONS = 64
# From one answer to the end of the next, and from the connection's beginning to the end of the first. A deadline for
# all of it: a timeout of single reads never ends a client that sends a byte now and then.
REQUEST_SECONDS = 10.0
# A connection that was cut frees its place within milliseconds.
SLOT_WAIT_SECONDS = 1.0
ACCEPT_BACKLOG = 128  # the library's five make clients wait a second whenever more come at once


class BoundedServer(ThreadingHTTPServer):
    """Owner of its connections, of which there are never more than `MAX_CONNECTIONS`.

    A new connection evicts the one that has gone longest without a response: a probe sends its request at once, and
    has its response before it is the oldest. A client that disconnects during its response is no error.
    """

    daemon_threads = True
    request_queue_size = ACCEPT_BACKLOG

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._lock = threading.Lock()
        self._connection_slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._answered_at: dict[socket.socket, float] = {}  # or when it began
        super().__init__(address, handler)

    def restart_deadline(self, connection: socket.socket) -> None:
        """Restart the connection's deadline."""
        with self._lock:
            if connection in self._answered_at:
                self._answered_at[connection] = time.monotonic()

    def service_actions(self) -> None:
        """Cut connections over their deadline. Called by `serve_forever` after each connection, and twice a second."""
        with self._lock:
            oldest = time.monotonic() - REQUEST_SECONDS
            for connection in [one for one, at in self._answered_at.items() if at < oldest]:
                self._cut(connection)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._connection_slots.acquire(blocking=False):
            with self._lock:
                if self._answered_at:
                    self._cut(min(self._answered_at, key=self._answered_at.__getitem__))
            if not self._connection_slots.acquire(timeout=SLOT_WAIT_SECONDS):
                super().shutdown_request(request)
                return
        with self._lock:
            self._answered_at[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:  # a descriptor that was closed may be another connection's by now
            self._answered_at.pop(request, None)
            super().shutdown_request(request)
        self._connection_slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        # The library prints tracebacks to standard error, between the lines of JSON.
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            logger.exception("a request to the metrics port failed")

    def _cut(self, connection: socket.socket) -> None:
        """Shut the socket down, which ends its thread's blocked read."""
        del self._answered_at[connection]
        with suppress(OSError):  # its client was quicker
            connection.shutdown(socket.SHUT_RDWR)
