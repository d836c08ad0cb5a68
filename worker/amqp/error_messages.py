"""Error messages about the broker, with host, user and remedy: the same in `check` and `run`."""

import re
from dataclasses import dataclass
from typing import Any

import pika
import pika.exceptions

from config.broker import BrokerSettings
from config.redacting import redacted

ACCESS_REFUSED, NOT_FOUND, PRECONDITION_FAILED = 403, 404, 406  # AMQP's reply codes
REFUSED_NAME = re.compile(r"access to (?:queue|exchange) '([^']+)'")
MAX_SHOWN_CHARS = 300


class QueueUnusable(Exception):
    """No worker can take jobs from the queue as it is declared; the message says why and what to do."""


def describe(error: BaseException) -> str:
    """Return the error's type and text, redacted and cut: pika's texts are long and may carry hosts."""
    return redacted(f"{type(error).__name__}: {error}".removesuffix(": "))[:MAX_SHOWN_CHARS]


@dataclass(frozen=True, slots=True)
class ErrorMessages:
    """The error messages about one broker. None contains the password."""

    settings: BrokerSettings

    def connection_failed(self, error: BaseException) -> str:
        """Explain why `connect` raised `error`."""
        if isinstance(error, pika.exceptions.ProbableAuthenticationError):
            local = " (a new broker lets guest in from its own machine only)" if self.user == "guest" else ""
            asked = f"{self.place} refuses user {self.user} or the password{local}"
            return f"{asked}: look at {self._settings_named('RABBITMQ_USER and RABBITMQ_PASS')}"
        if isinstance(error, pika.exceptions.ProbableAccessDeniedError):
            asked = f"{self.place} has no virtual host {self.vhost}, or user {self.user} may not use it"
            make = f"rabbitmqctl add_vhost {self.vhost}; {self._grant}"
            return f"{asked}: look at {self._settings_named('RABBITMQ_VHOST')}, or: {make}"
        asked = f"no broker answers at {self.place} ({describe(error)})"
        return f"{asked}: is it running? look at {self._settings_named('RABBITMQ_HOST and RABBITMQ_PORT')}"

    def queue_refused(self, name: str, error: Any) -> str:
        """Explain why queue `name` is unusable, from pika's `ChannelClosedByBroker`."""
        said = f"{name}: {error.reply_text}"
        if error.reply_code == PRECONDITION_FAILED:
            return self.queue_declared_otherwise(said)
        if error.reply_code == ACCESS_REFUSED:
            return f"{said}. Give the user the right: {self._grant}"
        if error.reply_code == NOT_FOUND:
            return f"{said}. Its jobs wait until the broker has it again; a quorum queue on several nodes outlives one"
        return f"{said}. Look at who uses it, or at RABBITMQ_QUEUE"

    def queue_declared_otherwise(self, said: str) -> str:
        """Explain what to do about a queue that no backend can declare; `said` begins with its name."""
        name = said.partition(":")[0]
        return (
            f"{said}. Backends declare it durable without arguments and are refused: let it run empty and delete it"
            f" (rabbitmqctl -p {self.vhost} delete_queue {name}); limits belong into a policy"
        )

    def session_ended(self, error: BaseException, *, is_connected: bool) -> str:
        """Explain why a session ended, or could not begin."""
        if not is_connected:
            return self.connection_failed(error)
        if isinstance(error, QueueUnusable):
            return str(error)
        if not isinstance(error, pika.exceptions.ChannelClosedByBroker) or error.reply_code != ACCESS_REFUSED:
            return describe(error)
        named = REFUSED_NAME.search(error.reply_text)
        return self.queue_refused(named[1] if named else self.settings.queue, error)

    # From the URL, which takes precedence over the single settings.

    @property
    def place(self) -> str:
        return f"{self.parameters.host}:{self.parameters.port}"

    @property
    def user(self) -> str:
        return str(self.parameters.credentials.username)

    @property
    def vhost(self) -> str:
        return str(self.parameters.virtual_host)

    @property
    def parameters(self) -> Any:
        return pika.URLParameters(self.settings.amqp_url)

    @property
    def _grant(self) -> str:
        return f"rabbitmqctl set_permissions -p {self.vhost} {self.user} '.*' '.*' '.*'"

    def _settings_named(self, names: str) -> str:
        return "RABBITMQ_URL" if self.settings.url is not None else names
