"""Connect to the broker, close connections, and wait between attempts."""

import logging
import random
import socket
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pika
import pika.exceptions

from config.broker import BrokerSettings
from config.logs import log_event
from worker.amqp.content_headers import TolerantConnection
from worker.amqp.error_messages import ErrorMessages, describe

# A broker that accepts a connection and does not answer must not block a thread for ever.
STACK_TIMEOUT_SECONDS = 5.0
BLOCKED_TIMEOUT_SECONDS = 5.0
# After a wrong password or vhost: an operator must act, and brokers count such attempts.
REFUSED_BACKOFF_SECONDS = 30.0
# How often a connection's thread serves heartbeats and checks whether it is to end.
POLL_SECONDS = 0.5
# How long a thread is waited for that publishes or settles what is left.
CLOSE_SECONDS = 3.0

# Short: a broker that is back has jobs waiting, and a refused attempt is cheap.
MIN_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.2, 1.0
BACKOFF_POLL_SECONDS = 0.05

logger = logging.getLogger(__name__)

Connection = Any  # pika has no type hints
Channel = Any
LOST = (pika.exceptions.AMQPError, OSError)
REFUSED = (pika.exceptions.ProbableAuthenticationError, pika.exceptions.ProbableAccessDeniedError)


def connect(settings: BrokerSettings, name: str) -> Connection:
    """Open a blocking connection that RabbitMQ lists under `name` and this host. Raises one of `LOST`."""
    parameters = pika.URLParameters(settings.amqp_url)
    parameters.heartbeat = settings.heartbeat_seconds
    parameters.socket_timeout = STACK_TIMEOUT_SECONDS
    parameters.stack_timeout = STACK_TIMEOUT_SECONDS
    parameters.blocked_connection_timeout = BLOCKED_TIMEOUT_SECONDS
    parameters.client_properties = {"connection_name": f"{name} on {socket.gethostname()}"}
    parameters.tcp_options = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 15000}
    return pika.BlockingConnection(parameters, _impl_class=TolerantConnection)


def server_properties(connection: Connection) -> dict[str, Any]:
    """Return what the broker said of itself as the connection was opened: its product, its version …"""
    return connection._impl.server_properties or {}  # a blocking connection shows only the capabilities among them


def close_connection(connection: Connection) -> None:
    """Close the connection where it is open; never raises for one that is lost."""
    if connection is None or not connection.is_open:
        return
    try:
        connection.close()
    except LOST as error:
        log_event(logger, "connection was gone before it was closed", logging.DEBUG, reason=describe(error))


class ConnectionProbe(NamedTuple):
    """Why the broker is unusable, empty where it is not, and the earliest next attempt by `time.monotonic()`."""

    reason: str = ""
    retry_at: float = 0.0


def probe_connection(settings: BrokerSettings) -> ConnectionProbe:
    """Connect once, close, and return what happened."""
    try:
        close_connection(connect(settings, "darkroom start"))
    except Exception as error:  # noqa: BLE001 - pika also raises errors that are no AMQPError; the consumer retries
        retry_at = time.monotonic() + REFUSED_BACKOFF_SECONDS if isinstance(error, REFUSED) else 0.0
        return ConnectionProbe(ErrorMessages(settings).connection_failed(error), retry_at)
    return ConnectionProbe()


class Backoff:
    """Jittered exponential backoff between attempts, the ceiling doubling up to `MAX_BACKOFF_SECONDS`."""

    def __init__(self) -> None:
        self._ceiling = MIN_BACKOFF_SECONDS

    def reset(self) -> None:
        """Start over with the shortest wait."""
        self._ceiling = MIN_BACKOFF_SECONDS

    def sleep(self, is_over: Callable[[], bool], *, at_least_seconds: float = 0.0) -> None:
        """Wait before the next attempt, or until `is_over`."""
        seconds = random.uniform(MIN_BACKOFF_SECONDS / 2, self._ceiling)  # noqa: S311 - jitter, not a secret
        self._ceiling = min(MAX_BACKOFF_SECONDS, self._ceiling * 2)
        deadline = time.monotonic() + max(seconds, at_least_seconds)
        while time.monotonic() < deadline and not is_over():
            time.sleep(BACKOFF_POLL_SECONDS)
