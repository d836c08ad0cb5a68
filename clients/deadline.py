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


class DeadlineTimer:
    """Owner of duplicates of the sockets that a thread uses inside a `deadline` block; it shuts them down at the end.

    `was_sent`: a byte of a request may have been sent; before that, a failure cannot have had an effect.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.was_sent = False
        self.is_expired = False
        self._lock = threading.Lock()
        self._duplicates: dict[int, socket.socket] = {}
        self._timeout = TIMEOUTS.call_after(seconds, self.expire)

    def raise_if_expired(self) -> None:
        if self.is_expired:
            raise DeadlineExpired(f"not done within {self.seconds:g} s")

    def guard(self, sock: socket.socket, *, is_new: bool) -> None:
        """Shut `sock` down when the time is over; `is_new`: its descriptor may have been another socket's before."""
        # A duplicate, because TLS detaches the plain socket it wraps, and http.client drops its own before the body.
        descriptor = sock.fileno()
        with self._lock:
            if descriptor in self._duplicates and not is_new:
                return
            stale = self._duplicates.pop(descriptor, None)
            self._duplicates[descriptor] = duplicate = socket.fromfd(descriptor, sock.family, sock.type)
            if stale is not None:
                stale.close()
            if self.is_expired:
                with suppress(OSError):  # the peer has closed it already
                    duplicate.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        TIMEOUTS.cancel(self._timeout)
        with self._lock:
            for duplicate in self._duplicates.values():
                duplicate.close()
            self._duplicates.clear()

    def expire(self) -> None:
        """End the block's calls now; later ones end at once."""
        with self._lock:
            self.is_expired = True
            for duplicate in self._duplicates.values():
                with suppress(OSError):
                    duplicate.shutdown(socket.SHUT_RDWR)


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

    def _new_conn(self) -> socket.socket:
        sock: socket.socket = super()._new_conn()  # type: ignore[misc]
        if _current.timer is not None:
            # Here and not after `connect`: a TLS handshake may be slow too.
            _current.timer.guard(sock, is_new=True)
        return sock

    def send(self, content: Any) -> None:
        if self.sock is None:
            self.connect()
        if _current.timer is not None:
            _current.timer.guard(self.sock, is_new=False)
            _current.timer.was_sent = True
        super().send(content)  # type: ignore[misc]

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
