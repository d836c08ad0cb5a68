"""The port of health and metrics answers probes, whatever else is connected to it."""

import http.client
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from tests.hostile.fuzzing import mutated_bytes
from tests.support.status_pages import status
from tests.support.world import HANG_SECONDS, eventually
from worker.monitoring import bounded_server
from worker.monitoring.bounded_server import MAX_CONNECTIONS
from worker.monitoring.http_server import HealthServer

NUM_CLIENTS = 200  # three times what the server lets in
NUM_PROBES = 30
# Of the test process and of the server's own: the listening socket, the selector's, the probe's.
SPARE = 20
REQUEST = b"GET /health/live HTTP/1.1\r\nHost: worker\r\n\r\n"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = HealthServer(0, CollectorRegistry(), lambda: "", status, lambda _: None)
    server.start()
    yield server.port
    server.close()


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=HANG_SECONDS)


def probe(port: int, path: str = "/health/live", method: str = "GET") -> tuple[int, bytes, int]:
    """Return status, body and the length that the headers name, on a connection of its own."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=HANG_SECONDS)) as connection:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read(), int(answer.headers["Content-Length"])


def answer_to(port: int, request: bytes) -> bytes:
    """Read all that comes back before the server closes the connection."""
    with connected(port) as connection, suppress(ConnectionError):
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))
    return b""


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Drippers(threading.Thread):
    """Clients that send a request byte by byte for ever, and come again at once where they are cut."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._port = port
        self._clients = [connected(port) for _ in range(NUM_CLIENTS)]
        self.num_sent = 0
        self.is_over = False

    def run(self) -> None:
        while not self.is_over:
            for number, client in enumerate(self._clients):
                try:
                    client.sendall(REQUEST[:1])
                except OSError:
                    client.close()
                    self._clients[number] = connected(self._port)
                self.num_sent += 1
        for client in self._clients:
            client.close()


def test_probes_are_answered_beside_any_number_of_idle_connections(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_server, "REQUEST_SECONDS", 1000.0)
    num_before, threads_before = num_descriptors(), threading.active_count()
    idle = [connected(port) for _ in range(NUM_CLIENTS)]
    assert probe(port)[0] == 200
    # The test's own ends of the connections are descriptors too.
    ours = NUM_CLIENTS + SPARE
    eventually(lambda: num_descriptors() - num_before <= MAX_CONNECTIONS + ours)
    eventually(lambda: threading.active_count() - threads_before <= MAX_CONNECTIONS + 1)

    for path in ("/health/live", "/health/ready", "/metrics", "/status.json") * 5:
        assert probe(port, path)[0] == 200
    for client in idle:
        client.close()

    eventually(lambda: threading.active_count() <= threads_before)


def test_probes_are_answered_beside_clients_that_drip_and_come_again(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_server, "REQUEST_SECONDS", 1000.0)
    threads_before = threading.active_count()
    drippers = Drippers(port)
    drippers.start()
    eventually(lambda: drippers.num_sent > NUM_CLIENTS)

    statuses = [probe(port)[0] for _ in range(NUM_PROBES)]

    assert statuses == [200] * NUM_PROBES
    assert threading.active_count() - threads_before <= MAX_CONNECTIONS + 2
    drippers.is_over = True
    drippers.join()


def test_a_request_that_takes_too_long_is_cut_however_often_a_byte_comes(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_server, "REQUEST_SECONDS", 1.0)
    with connected(port) as client, pytest.raises(OSError):
        deadline = time.monotonic() + HANG_SECONDS
        while time.monotonic() < deadline:
            client.sendall(b"G")
            time.sleep(0.05)


def test_idle_connection_is_closed_and_one_with_requests_stays(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_server, "REQUEST_SECONDS", 1.0)
    with connected(port) as idle, closing(http.client.HTTPConnection("127.0.0.1", port, timeout=HANG_SECONDS)) as used:
        used.connect()
        first = used.sock
        began_at = time.monotonic()
        while time.monotonic() - began_at < 2.5:
            used.request("GET", "/health/live")
            assert used.getresponse().read() == b"live\n"
            time.sleep(0.05)

        assert used.sock is first
        assert idle.recv(1) == b""


def test_clients_that_leave_before_their_answer_print_no_traceback(
    port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(100):
        client = connected(port)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.sendall(REQUEST * 20)
        client.close()  # a reset
    for _ in range(20):
        with connected(port) as client:
            client.sendall(REQUEST[:20])

    assert probe(port)[0] == 200
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("request_", "status_line"),
    [
        (b"GET /health/live\r\n\r\n", b"HTTP/1.1 200"),
        (b"GET /health/live HTTP/1.0\r\n\r\n", b"HTTP/1.1 200"),
        (b"GET /health/live?a=1 HTTP/1.1\r\n\r\n", b"HTTP/1.1 200"),
        (b"HEAD /health/live HTTP/1.1\r\n\r\n", b"HTTP/1.1 200"),
        (b"POST /health/live HTTP/1.1\r\nContent-Length: 4\r\n\r\nGET ", b"HTTP/1.1 501"),
        (b"GET /health/live HTTP/1.1\r\nContent-Length: 43\r\n\r\n" + REQUEST, b"HTTP/1.1 200"),
        (b"GET /health/live HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n" + REQUEST, b"HTTP/1.1 200"),
        (b"GET /nowhere HTTP/1.1\r\n\r\n", b"HTTP/1.1 404"),
        (b"GET /health/live HTTP/2.0\r\n\r\n", b"HTTP/1.1 505"),
        (b"GET /health/live HTTP/1.\xb2\r\n\r\n", b"HTTP/1.1 400"),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", b"HTTP/1.1 414"),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", b"HTTP/1.1 431"),
        (b"GET / HTTP/1.1\r\n" + b"X: 1\r\n" * 500 + b"\r\n", b"HTTP/1.1 431"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"HTTP/1.1 400"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"HTTP/1.1 505"),
    ],
)
def test_odd_requests_have_one_answer_and_print_no_traceback(
    port: int, capfd: pytest.CaptureFixture[str], request_: bytes, status_line: bytes
) -> None:
    answer = answer_to(port, request_)

    assert answer.startswith(status_line)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert probe(port)[0] == 200
    assert capfd.readouterr().err == ""


def test_fuzzed_requests_print_no_traceback(port: int, capfd: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(7)
    for _ in range(300):
        answer_to(port, mutated_bytes(rng, REQUEST * rng.randint(1, 3)))

    assert probe(port)[0] == 200
    assert capfd.readouterr().err == ""


def test_head_has_the_headers_of_get_and_no_body(port: int) -> None:
    assert probe(port, method="HEAD") == (200, b"", len(probe(port)[1]))
