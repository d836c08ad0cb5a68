"""Ports for private servers, below the range the kernel takes for outgoing connections.

A server that stops and comes back needs its port to be free still. In the kernel's own range a client that keeps
calling the stopped server may be given that very port for its own end, or even connect to itself.
"""

import secrets
import socket

FIRST_PORT = 16000
LAST_PORT = 31999  # Linux hands out 32768 and up; rabbitmqctl's own 35672-35682 are outside as well
MAX_TRIES = 1000

_given: set[int] = set()


def free_port() -> int:
    """Return a port of 127.0.0.1 that has no listener and that this process was not given before.

    Raises `OSError` where a thousand tries found none.
    """
    for _ in range(MAX_TRIES):
        port = FIRST_PORT + secrets.randbelow(LAST_PORT - FIRST_PORT + 1)
        if port not in _given and _is_free(port):
            _given.add(port)
            return port
    raise OSError(f"found no free port between {FIRST_PORT} and {LAST_PORT}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
