"""The arguments that a queue of jobs was declared with, and the user's rights on it, read from the broker's refusals.

AMQP does not tell them. A refusal names the first argument that differs and its value, so declaring again with what is
known by then finds the next one.

RabbitMQ looks at permissions before arguments: a request with a wrong argument is refused as such (406) to a user who
has the right, and as forbidden (403) to one who has not. No queue is made by it, and no message taken.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pika.exceptions

from worker.amqp.connection import Channel, Connection
from worker.amqp.error_messages import PRECONDITION_FAILED, QueueUnusable

Value = str | int | bool
MAX_ARGUMENTS = 20
REFUSAL = re.compile(
    r"inequivalent arg '([^']+)' for queue .* but current is (?:the value )?'(.*?)'(?: of type '(\w+)')?$"
)
# Not arguments, but what a queue is declared as; each differs from a queue that backends declare.
PROPERTIES = ("durable", "auto_delete", "exclusive")


def declared_arguments(connection: Connection, name: str) -> dict[str, Value]:
    """Return the arguments of an existing queue; ends with one of `PROPERTIES` where that differs from a durable queue.

    Raises pika's `ChannelClosedByBroker` where the user may not declare it. The default queue type is left out.
    """
    known: dict[str, Value] = {}
    while len(known) < MAX_ARGUMENTS and not known.keys() & set(PROPERTIES):
        try:
            with connection.channel() as channel:
                channel.queue_declare(name, durable=True, arguments=dict(known))
                break
        except pika.exceptions.ChannelClosedByBroker as error:
            found = REFUSAL.search(error.reply_text)
            if error.reply_code != PRECONDITION_FAILED or found is None or found[1] in known:
                raise
            known[found[1]] = _value(found[2], found[3])
    return known


def inspect_declaration(connection: Connection, name: str) -> str:
    """Return a warning about how the queue is declared, empty without one; raise `QueueUnusable` for a stream.

    A user who may not declare the queue sees its arguments nowhere, and gets no warning.
    """
    try:
        arguments = declared_arguments(connection, name)
    except pika.exceptions.ChannelClosedByBroker:
        return ""
    check_usable(name, arguments)
    return single_consumer_warning(name, arguments)


def try_to_declare(connection: Connection, name: str) -> None:
    """Raise pika's `ChannelClosedByBroker` where the user may not declare the missing queue."""
    with _wrong_request(connection) as channel:
        channel.queue_declare(name, durable=True, arguments={"x-expires": 0})


def try_to_consume(connection: Connection, name: str) -> None:
    """Raise pika's `ChannelClosedByBroker` where the queue cannot be used or the user may not take from it."""
    with _wrong_request(connection) as channel:
        channel.basic_consume(name, lambda *_: None, arguments={"x-priority": "not a number"})


@contextmanager
def _wrong_request(connection: Connection) -> Iterator[Channel]:
    try:
        with connection.channel() as channel:
            yield channel
    except pika.exceptions.ChannelClosedByBroker as error:
        if error.reply_code != PRECONDITION_FAILED:
            raise


def check_usable(name: str, arguments: Mapping[str, Value]) -> None:
    """Raise `QueueUnusable` for a stream."""
    if arguments.get("x-queue-type") == "stream":
        raise QueueUnusable(
            f"{name} is a stream, which keeps every job for all readers and takes none back: declare it as a classic or"
            " a quorum queue"
        )


def single_consumer_warning(name: str, arguments: Mapping[str, Value]) -> str:
    """Return a sentence where only one of several workers would get jobs, else nothing."""
    if arguments.get("x-single-active-consumer") is not True:
        return ""
    return (
        f"{name} has x-single-active-consumer: one worker gets every job, and the others none until it is gone; declare"
        " it without, and keep the order of jobs, where it matters, in the backend"
    )


def _value(text: str, kind: str | None) -> Value:
    if kind == "bool":
        return text == "true"
    return int(text) if kind not in (None, "longstr") and text.isdecimal() else text
