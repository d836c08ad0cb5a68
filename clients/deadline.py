"""A total deadline for HTTP calls: urllib3's timeouts restart with every byte, so a slow stream never reaches them.

`deadline` sets the end for every request that its thread sends inside the block; connections that mix in
`DeadlineConnection` report their sockets to it, and a timer shuts those down when the time is over. The blocked read
then ends at once. Such connections also read responses as `clients.responses` does, so that no interim one is taken for
the final one.
"""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from clients.cutoff import current_cutoff
from clients.responses import FinalResponse
from clients.timer_thread import TIMEOUTS


class DeadlineExpired(Exception):
    """The time of the enclosing `deadline` block is over."""


class GuardedSocket:
    """Duplicate of a connection's socket, by which other threads shut it down. Made with one user, the connection, and
    closed with its last: a response outlives its connection.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._lock = threading.Lock()
        self._num_users = 1
        # A duplicate: TLS detaches the plain socket it wraps, and http.client drops its own before the body. One
        # for all calls of a connection, which are many.
        self._duplicate = socket.fromfd(sock.fileno(), sock.family, sock.type)

    def use(self) -> None:
        """Count one more user."""
        with self._lock:
            self._num_users += 1

    def release(self) -> None:
        """Count one user less."""
        with self._lock:
            self._num_users -= 1
            if self._num_users == 0:
                self._duplicate.close()

    def shut_down(self) -> None:
        """End the calls that are blocked in it, and later ones."""
        with self._lock, suppress(OSError):  # the peer has closed it already
            self._duplicate.shutdown(socket.SHUT_RDWR)


class DeadlineTimer:
    """User of the sockets that a thread uses inside a `deadline` block; it shuts them down at the end.

    `was_sent`: a byte of a request may have been sent; before that, a failure cannot have had an effect.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.was_sent = False
        self.is_expired = False
        self._lock = threading.Lock()
        self._sockets: set[GuardedSocket] = set()
        self._timeout = TIMEOUTS.call_after(seconds, self.expire)

    def raise_if_expired(self) -> None:
        if self.is_expired:
            raise DeadlineExpired(f"not done within {self.seconds:g} s")

    def guard(self, sock: GuardedSocket) -> None:
        """Shut `sock` down when the time is over."""
        with self._lock:
            if sock not in self._sockets:
                sock.use()
                self._sockets.add(sock)
            if self.is_expired:
                sock.shut_down()

    def close(self) -> None:
        TIMEOUTS.cancel(self._timeout)
        with self._lock:
            for sock in self._sockets:
                sock.release()
            self._sockets.clear()

    def expire(self) -> None:
        """End the block's calls now; later ones end at once."""
        with self._lock:
            self.is_expired = True
            for sock in self._sockets:
                sock.shut_down()


class _Current(threading.local):
    timer: DeadlineTimer | None = None


_current = _Current()


@contextmanager
def deadline(seconds: float) -> Iterator[DeadlineTimer]:
    """End every guarded call of this thread `seconds` from now. Blocks do not nest.

    Name resolution is outside it: the C library's resolver has timeouts of its own and cannot be interrupted.
    """
    timer = DeadlineTimer(seconds)
    if (cutoff := current_cutoff()) is not None:
        cutoff.follow(timer.expire)
    _current.timer = timer
    try:
        yield timer
    finally:
        _current.timer = None
        timer.close()


def current_timer() -> DeadlineTimer | None:
    return _current.timer


class DeadlineConnection:
    """Mixin, first among the bases, for urllib3 connections: reports each socket to the current timer, and reads whole
    answers, after `Expect: 100-continue` too."""

    sock: Any
    connect: Any
    response_class: Any = FinalResponse
    _guarded: GuardedSocket | None = None

    def _new_conn(self) -> socket.socket:
        sock: socket.socket = super()._new_conn()  # type: ignore[misc]
        self._release()
        self._guarded = GuardedSocket(sock)
        # Here and not after `connect`: a TLS handshake may be slow too.
        self._guard()
        return sock

    def close(self) -> None:
        super().close()  # type: ignore[misc]
        self._release()

    def send(self, content: Any) -> None:
        if self.sock is None:
            self.connect()
        if _current.timer is not None:
            self._guard()
            _current.timer.was_sent = True
        super().send(content)  # type: ignore[misc]

    def _guard(self) -> None:
        if _current.timer is not None and self._guarded is not None:
            _current.timer.guard(self._guarded)

    def _release(self) -> None:
        if self._guarded is not None:
            self._guarded.release()
            self._guarded = None

    def _handle_expect_response(self, message_body: Any) -> None:
        """Read the response that came before the body of a request with `Expect: 100-continue`; botocore calls it.

        botocore's own takes every status but 100 for the final response and then sends no body; it drops a status line
        without a reason, and reads for ever from a connection that ends after a 100.
        """
        response = self.response_class(self.sock, method=self._method)  # type: ignore[attr-defined]
        # Its buffer may hold more than the status line, so the same reader has to read the rest.
        self.response_class = lambda *_arguments, **_options: response
        if response.is_interim_next():
            # Any interim response will do: RFC 9110 10.1.1 lets clients send the body without the 100.
            if message_body is not None:
                self.send(message_body)
        else:
            self._response_received = True


def guarded_pools(http: Any, https: Any) -> dict[str, Any]:
    """Return urllib3's `pool_classes_by_scheme`: subclasses of `http` and `https` with guarded connections."""
    guarded: dict[str, Any] = {}
    for scheme, pool in (("http", http), ("https", https)):
        connection = type(f"Deadline{pool.ConnectionCls.__name__}", (DeadlineConnection, pool.ConnectionCls), {})
        guarded[scheme] = type(f"Deadline{pool.__name__}", (pool,), {"ConnectionCls": connection})
    return guarded
