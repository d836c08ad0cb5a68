"""A hard end for HTTP calls: urllib3's timeouts start again with every byte, so a server that drips never trips them.

`deadline` sets the end for whatever its thread sends inside the block; connections that mix in `Guarded` report their
sockets to it, and a timer shuts those down when the time is over. The blocked read then ends at once. Guarded
connections also read answers as `clients.answers` does: none takes an interim answer for the final one.
"""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from clients.answers import FinalAnswer
from clients.cutoff import current_cutoff


class DeadlineExpired(Exception):
    """The time of the enclosing `deadline` block is over."""


class DeadlineTimer:
    """Owns duplicates of the sockets one thread uses inside one `deadline` block, and shuts them down at its end.

    `was_sent` says whether a byte of a request may have left: before that, a failure cannot have had an effect.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.was_sent = False
        self._lock = threading.Lock()
        self._is_expired = False
        self._duplicates: dict[int, socket.socket] = {}
        self._timer = threading.Timer(max(seconds, 0.0), self.expire)
        self._timer.daemon = True
        self._timer.start()

    @property
    def is_expired(self) -> bool:
        return self._is_expired

    def raise_if_expired(self) -> None:
        if self._is_expired:
            raise DeadlineExpired(f"not done within {self.seconds:g} s")

    def guard(self, sock: socket.socket, *, is_new: bool) -> None:
        """Shut `sock` down when the time is over; `is_new` where its descriptor may have been another's before."""
        # A duplicate, because TLS detaches the plain socket it wraps, and http.client drops its own before the body.
        descriptor = sock.fileno()
        with self._lock:
            if descriptor in self._duplicates and not is_new:
                return
            stale = self._duplicates.pop(descriptor, None)
            self._duplicates[descriptor] = duplicate = socket.fromfd(descriptor, sock.family, sock.type)
            if stale is not None:
                stale.close()
            if self._is_expired:
                _shut(duplicate)

    def close(self) -> None:
        self._timer.cancel()
        with self._lock:
            for duplicate in self._duplicates.values():
                duplicate.close()
            self._duplicates.clear()

    def expire(self) -> None:
        """End the block's calls now; those that follow end at once."""
        with self._lock:
            self._is_expired = True
            for duplicate in self._duplicates.values():
                _shut(duplicate)


class _Current(threading.local):
    timer: DeadlineTimer | None = None


_current = _Current()


@contextmanager
def deadline(seconds: float) -> Iterator[DeadlineTimer]:
    """End every guarded call of this thread `seconds` from now. Blocks do not nest.

    Name resolution alone is outside it: the C library's resolver has timeouts of its own and cannot be interrupted.
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


class Guarded:
    """Mixin, first among the bases, for urllib3 connections: reports each socket to the current timer, and reads whole
    answers, after `Expect: 100-continue` too."""

    sock: Any
    connect: Any
    response_class: Any = FinalAnswer

    def _new_conn(self) -> socket.socket:
        sock: socket.socket = super()._new_conn()  # type: ignore[misc]
        if _current.timer is not None:
            # Here and not after `connect`: a TLS handshake may drip too.
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
        """Read what came while a request with `Expect: 100-continue` waits with its body; botocore calls it.

        botocore's own takes whatever is not 100 for the final answer and then sends no body; a status line without a
        reason it drops, and a connection that ends behind a 100 it reads for ever.
        """
        answer = self.response_class(self.sock, method=self._method)  # type: ignore[attr-defined]
        # The reader may hold more than it was asked for, so that it has to read the rest too.
        self.response_class = lambda *_arguments, **_options: answer
        if answer.is_interim_next():
            # Any interim answer will do: RFC 9110 10.1.1 has nobody wait for the 100.
            if message_body is not None:
                self.send(message_body)
        else:
            self._response_received = True


def guarded_pools(http: Any, https: Any) -> dict[str, Any]:
    """urllib3's `pool_classes_by_scheme`, of pools like `http` and `https` but with guarded connections."""
    return {"http": _guarded_pool(http), "https": _guarded_pool(https)}


def _guarded_pool(pool: Any) -> Any:
    connection = type(f"Guarded{pool.ConnectionCls.__name__}", (Guarded, pool.ConnectionCls), {})
    return type(f"Guarded{pool.__name__}", (pool,), {"ConnectionCls": connection})


def _shut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        # The peer was faster: there is nothing left to shut.
        return
