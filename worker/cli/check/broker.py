"""Check the broker: the login, the declaration of the job queue, the permissions, the policies."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pika
import pika.exceptions

from clients.management import effective_policies
from config.broker import BrokerSettings
from worker.amqp.connection import LOST, close_connection, connect, server_properties
from worker.amqp.declared import (
    PROPERTIES,
    check_usable,
    declared_arguments,
    single_consumer_warning,
    try_to_consume,
    try_to_declare,
)
from worker.amqp.error_messages import ACCESS_REFUSED, ErrorMessages, QueueUnusable, describe
from worker.amqp.topology import QueueNames, is_missing
from worker.cli.check.broker_versions import describe_broker
from worker.cli.check.checks import CheckFailed
from worker.cli.check.policies import limits_found_by_trying, limits_in

_Connection = Any  # pika has no type hints


class BrokerProbe:
    """Checks of the broker, a connection for each. A refused login is not tried again: brokers count them.

    Consumes no message and leaves nothing behind: queues it declares are deleted. Each check returns what was seen or
    raises `CheckFailed`.
    """

    def __init__(self, settings: BrokerSettings) -> None:
        self._settings = settings
        self._error_messages = ErrorMessages(settings)
        self._names = QueueNames.of(settings)
        self._is_refused = False

    def connection(self) -> str:
        """Connect with the user, the password and the virtual host."""
        with self._connected() as connection:
            user, vhost = self._error_messages.user, self._error_messages.vhost
            place = f"{self._error_messages.place} as {user}, virtual host {vhost}"
            return f"connected to {place}: {describe_broker(server_properties(connection))}"

    def queue(self) -> str:
        """Look at how each queue of jobs is declared, and whether the user may take from it or make it."""
        good: dict[str, str] = {}
        bad: dict[str, str] = {}
        unusable = []
        with self._connected() as connection:
            for name in self._names.job_queues:
                try:
                    good[name] = self._describe_queue(connection, name)
                except CheckFailed as error:
                    bad[name] = str(error)
                except QueueUnusable as error:
                    bad[name] = str(error)
                    unusable.append(name)
        if not bad:
            return "; ".join(good.values())
        others = [name for name in self._names.job_queues if name not in unusable]
        meanwhile = f". A worker leaves {', '.join(unusable)} out and takes the jobs of {', '.join(others)}"
        raise CheckFailed("; ".join(bad.values()) + (meanwhile if unusable and others else ""))

    def _describe_queue(self, connection: _Connection, name: str) -> str:
        """Raise `QueueUnusable` where no worker can take from the queue, `CheckFailed` for what else is wrong."""
        try:
            with connection.channel() as channel:
                found = channel.queue_declare(name, passive=True).method
            try_to_consume(connection, name)
        except pika.exceptions.ChannelClosedByBroker as error:
            if not is_missing(error):
                raise QueueUnusable(self._error_messages.queue_refused(name, error)) from error
            return self._describe_missing(connection, name)
        try:
            arguments = declared_arguments(connection, name)
        except pika.exceptions.ChannelClosedByBroker as error:
            if error.reply_code == ACCESS_REFUSED:
                return f"{name} is there; how it is declared is told only to users who may declare it"
            raise QueueUnusable(self._error_messages.queue_refused(name, error)) from error
        check_usable(name, arguments)
        if warning := single_consumer_warning(name, arguments):
            raise (QueueUnusable if self._names.others else CheckFailed)(warning)
        if wrong := [f"{one} is {arguments[one]}" for one in PROPERTIES if one in arguments]:
            raise CheckFailed(self._error_messages.queue_declared_otherwise(f"{name}: {wrong[0]}"))
        depth = f"{found.message_count} wait in it, for {found.consumer_count} consumers"
        if not arguments:
            return f"{name} is durable without arguments, as backends declare it; {depth}"
        shown = ", ".join(f"{key}: {value}" for key, value in sorted(arguments.items()))
        return f"{name} is durable with {shown}, which who declares it must give too; {depth}"

    def _describe_missing(self, connection: _Connection, name: str) -> str:
        try:
            try_to_declare(connection, name)
        except pika.exceptions.ChannelClosedByBroker as error:
            raise QueueUnusable(self._error_messages.queue_refused(name, error)) from error
        return f"{name} does not exist yet: the first to come makes it"

    def own_queues(self) -> str:
        """Check that the worker's own queues exist or may be declared, and that no policy limits them.

        Missing ones stay missing: permissions and limits are tried on queues with other names.
        """
        own = [name for name in self._names.everything if name not in self._names.job_queues]
        with self._connected() as connection:
            missing = [name for name in own if self._declare_passively(connection, name) is None]
            # Server-named, as the queue on which each worker receives cancel orders.
            self._try_permissions(connection, self._names.jobs, "")
            for jobs in self._names.job_queues:
                own_of_jobs = {*self._names.family(jobs), *(self._names.shared if jobs == self._names.jobs else ())}
                if own_of_jobs & set(missing):
                    self._try_permissions(connection, jobs, f"{jobs}.check-{uuid.uuid4().hex[:8]}")
            self._check_limits(connection)
        if missing:
            return f"{len(missing)} of {len(own)} do not exist yet; the user may make them"
        return f"all {len(own)} are there"

    def _try_permissions(self, connection: _Connection, jobs: str, name: str) -> None:
        """Declare an exclusive queue, publish into it and get that message."""
        try:
            with connection.channel() as channel:
                channel.confirm_delivery()
                made = channel.queue_declare(name, exclusive=True).method.queue
                channel.basic_publish("", made, b"", mandatory=True)
                channel.basic_get(made, auto_ack=True)
        except pika.exceptions.ChannelClosedByBroker as error:
            raise CheckFailed(self._error_messages.queue_refused(f"{jobs}.*", error)) from error

    def _check_limits(self, connection: _Connection) -> None:
        limits: list[str] = []
        parameters = self._error_messages.parameters
        if parameters.ssl_options is None:  # else the management port would get the password in plain text
            login = parameters.credentials
            policies = effective_policies(
                parameters.host, parameters.virtual_host, user=login.username, password=login.password
            )
            limits = limits_in(policies, self._names)
        # A user may have the permission to declare the worker's queues alone: then it is not tried.
        with suppress(pika.exceptions.ChannelClosedByBroker):
            limits = limits or limits_found_by_trying(connection, self._names)
        if limits:
            seen = f"a policy limits what queues named {self._names.jobs}.* hold: {'; '.join(limits)}"
            look = f"rabbitmqctl -p {self._error_messages.vhost} list_policies, and list_operator_policies"
            raise CheckFailed(
                f"{seen}. Ends and jobs would be lost at the limit. Have its pattern leave them out,"
                f" as ^{self._names.jobs}$ does: {look}"
            )

    def _declare_passively(self, connection: _Connection, name: str) -> Any:
        """Declare the queue passively; None where it does not exist."""
        try:
            with connection.channel() as channel:
                return channel.queue_declare(name, passive=True).method
        except pika.exceptions.ChannelClosedByBroker as error:
            if is_missing(error):
                return None
            raise CheckFailed(self._error_messages.queue_refused(name, error)) from error

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
            seen = f"{self._error_messages.place} closed the connection: {describe(error)}"
            raise CheckFailed(f"{seen}. Look at its log") from error
        finally:
            close_connection(connection)
