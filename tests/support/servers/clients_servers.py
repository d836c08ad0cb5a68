"""HTTP servers that misbehave, each named for what it does. All listen on the loopback interface and keep a journal."""

import socket
import struct
import threading
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Self

BYTE_PAUSE_SECONDS = 0.05


class Server:
    """Accepts connections and hands each to a thread of its own, which runs `converse`.

    `requests` holds every request as it arrived, head and body; `num_connections` counts also those that sent none.
    """

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self.num_connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._is_open = True
        self._open: list[socket.socket] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def converse(self, peer: socket.socket) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_open = False
        self._listener.close()
        for peer in self._open:
            peer.close()

    def _accept(self) -> None:
        while self._is_open:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            self.num_connections += 1
            self._open.append(peer)
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        try:
            self.converse(peer)
        except OSError:
            return
        finally:
            peer.close()

    def receive(self, peer: socket.socket) -> bytes | None:
        """Read one request with its body into the journal; None where the peer is gone."""
        received = b""
        while b"\r\n\r\n" not in received:
            chunk = peer.recv(65536)
            if not chunk:
                return None
            received += chunk
        head, _, body = received.partition(b"\r\n\r\n")
        if header(head, "expect") is not None:
            peer.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        while len(body) < int(header(head, "content-length") or 0):
            body += peer.recv(65536)
        request = head + b"\r\n\r\n" + body
        self.requests.append(request)
        return request


class AnsweringServer(Server):
    """Answers each request with the next of `answers`, and for ever with the last."""

    def __init__(self, answers: Iterable[bytes]) -> None:
        super().__init__()
        self._answers = list(answers)

    def converse(self, peer: socket.socket) -> None:
        while self.receive(peer) is not None:
            answer = self._answers[min(len(self.requests), len(self._answers)) - 1]
            peer.sendall(answer)
            if b"Connection: close" in answer:
                return


class DrippingServer(Server):
    """Answers `num_sound` requests, then sends `prompt` at once and `drip` one byte at a time, for ever."""

    def __init__(self, prompt: bytes = b"", drip: bytes = b"x", *, num_sound: int = 0) -> None:
        super().__init__()
        self._prompt = prompt
        self._drip = drip
        self._num_sound = num_sound

    def converse(self, peer: socket.socket) -> None:
        for _ in range(self._num_sound):
            self.receive(peer)
            peer.sendall(answer(200))
        self.receive(peer)
        drip_for_ever(peer, self._prompt, self._drip)


class DrippingHandshakeServer(Server):
    """Begins a TLS handshake that arrives one byte at a time."""

    def converse(self, peer: socket.socket) -> None:
        peer.recv(65536)
        # A handshake record of 16383 bytes, which begin a server's hello.
        drip_for_ever(peer, b"\x16\x03\x03\x3f\xff\x02\x00\x3f\xfb\x03\x03", b"x")


class SilentServer(Server):
    """Takes whatever is sent and never answers; before TLS that is a handshake without end."""

    def converse(self, peer: socket.socket) -> None:
        while chunk := peer.recv(65536):
            self.requests.append(chunk)


class ResettingServer(Server):
    """Takes a request and resets the connection."""

    def converse(self, peer: socket.socket) -> None:
        self.receive(peer)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def drip_for_ever(peer: socket.socket, prompt: bytes, drip: bytes) -> None:
    peer.sendall(prompt)
    while True:
        for byte in drip:
            peer.sendall(bytes((byte,)))
            time.sleep(BYTE_PAUSE_SECONDS)


def answer(status: int, body: bytes = b"", *, length: int | None = None, **headers: str) -> bytes:
    """Build an HTTP answer; `length` is a false Content-Length. Underscores in header names become dashes."""
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body) if length is None else length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def header(request: bytes, name: str) -> str | None:
    """Return the value of one header of a request."""
    for line in request.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]:
        found, _, value = line.partition(b":")
        if found.decode().lower() == name.lower():
            return value.strip().decode()
    return None


def body_of(request: bytes) -> bytes:
    return request.partition(b"\r\n\r\n")[2]


def refused_url() -> str:
    """Return an address that has no listener."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"
