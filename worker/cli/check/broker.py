"""The broker as a worker and a backend need it: the login, the queue of the jobs, the right to make queues."""

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import pika
import pika.exceptions

from clients.management import effective_policies
from config.broker import BrokerSettings
from worker.amqp.connection import LOST, close_connection, connect
from worker.amqp.error_messages import ACCESS_REFUSED, ErrorMessages, describe
from worker.amqp.topology import NOT_FOUND, QueueNames
from worker.cli.check.checks import CheckFailed
from worker.cli.check.policies import limits_met, limits_told

_Connection = Any  # pika has no type hints


class BrokerProbe:
    """Tries the broker, a connection for each question. A login that was refused is not tried again: brokers count.

    Takes no message and leaves nothing: what queues it makes are deleted again. Every question returns what was seen or
    raises `CheckFailed`.
    """

    def __init__(self, settings: BrokerSettings) -> None:
        self._settings = settings
        self._error_messages = ErrorMessages(settings)
        self._names = QueueNames(settings.queue)
        self._is_refused = False

    def connection(self) -> str:
        """Is the broker there, and does it take the user, the password and the virtual host?"""
        with self._connected():
            return f"connected to {self._place} as {self._user}, virtual host {self._vhost}"

    def queue(self) -> str:
        """Is the queue of the jobs declared as every backend declares it?"""
        name = self._names.jobs
        with self._connected() as connection:
            found = self._look(connection, name)
            if found is None:
                return f"{name} does not exist yet: the first to come makes it"
            try:
                # Only of a queue that is there: of another it would be the making.
                with connection.channel() as channel:
                    channel.queue_declare(name, durable=True)
            except pika.exceptions.ChannelClosedByBroker as error:
                if error.reply_code == ACCESS_REFUSED:
                    return f"{name} is there; how it is declared is told only to users who may declare it"
                raise CheckFailed(self._why_refused(name, error)) from error
        depth = f"{found.message_count} wait in it, for {found.consumer_count} consumers"
        return f"{name} is durable without arguments, as backends declare it; {depth}"

    def own_queues(self) -> str:
        """Are the worker's own queues there, or may it make them? Does no policy limit what they hold?

        What is missing stays missing: rights and limits are tried on queues that no worker knows.
        """
        own = [name for name in self._names.everything if name != self._names.jobs]
        with self._connected() as connection:
            missing = [name for name in own if self._look(connection, name) is None]
            # Without a name, as the queue that each worker hears of cancelled jobs by.
            self._try_rights(connection, "")
            if missing:
                self._try_rights(connection, f"{self._names.jobs}.check-{uuid.uuid4().hex[:8]}")
            self._look_for_limits(connection)
        if missing:
            return f"{len(missing)} of {len(own)} do not exist yet; the user may make them"
        return f"all {len(own)} are there"

    def _try_rights(self, connection: _Connection, name: str) -> None:
        """Make a queue of our own, publish into it and take that message out of it."""
        try:
            with connection.channel() as channel:
                channel.confirm_delivery()
                made = channel.queue_declare(name, exclusive=True).method.queue
                channel.basic_publish("", made, b"", mandatory=True)
                channel.basic_get(made, auto_ack=True)
        except pika.exceptions.ChannelClosedByBroker as error:
            raise CheckFailed(self._why_refused(f"{self._names.jobs}.*", error)) from error

    def _look_for_limits(self, connection: _Connection) -> None:
        limits = limits_told(self._policies(), self._names)
        # A user may have the right to make the worker's queues alone: then it is not tried.
        with suppress(pika.exceptions.ChannelClosedByBroker):
            limits = limits or limits_met(connection, self._names)
        if limits:
            asked = f"a policy limits what queues named {self._names.jobs}.* hold: {'; '.join(limits)}"
            look = f"rabbitmqctl -p {self._vhost} list_policies, and list_operator_policies"
            raise CheckFailed(
                f"{asked}. Ends and jobs would be lost at the limit. Have its pattern leave them out,"
                f" as ^{self._names.jobs}$ does: {look}"
            )

    def _policies(self) -> Mapping[str, Mapping[str, Any]]:
        asked = self._error_messages.parameters
        if asked.ssl_options is not None:
            return {}  # the interface's usual port would have the password in the clear
        login = asked.credentials
        return effective_policies(asked.host, asked.virtual_host, user=login.username, password=login.password)

    def _look(self, connection: _Connection, name: str) -> Any:
        """What the broker says of the queue; None where it does not exist."""
        try:
            with connection.channel() as channel:
                return channel.queue_declare(name, passive=True).method
        except pika.exceptions.ChannelClosedByBroker as error:
            if error.reply_code == NOT_FOUND:
                return None
            raise CheckFailed(self._why_refused(name, error)) from error

    @contextmanager
    def _connected(self) -> Iterator[_Connection]:
        if self._is_refused:
            raise CheckFailed("no connection")
        try:
            connection = connect(self._settings, "darkroom check")
        except LOST as error:
            self._is_refused = True
            raise CheckFailed(self._error_messages.connection_failed(error)) from error
        try:
            yield connection
        except LOST as error:
            raise CheckFailed(f"{self._place} closed the connection: {describe(error)}. Look at its log") from error
        finally:
            close_connection(connection)

    def _why_refused(self, name: str, error: Any) -> str:
        return self._error_messages.queue_refused(name, error)

    @property
    def _place(self) -> str:
        return self._error_messages.place

    @property
    def _user(self) -> str:
        return self._error_messages.user

    @property
    def _vhost(self) -> str:
        return self._error_messages.vhost
