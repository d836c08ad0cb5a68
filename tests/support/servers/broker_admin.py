"""What operators do to a broker by rabbitmqctl, on the console that is open: each call would start Erlang anew."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from examples.parts.rabbitmq import RabbitMQ

ANY = '<<".*">>'


def _binary(text: str) -> str:
    """Write the text as an Erlang binary."""
    return f"<<{json.dumps(text)}>>"


@contextmanager
def policy(rabbitmq: RabbitMQ, name: str, pattern: str, definition: dict[str, Any]) -> Iterator[None]:
    """Set a policy on the queues whose names `pattern` matches, and take it back."""
    fields = ", ".join(map(_binary, ("/", name, pattern, json.dumps(definition), "0", "all", "test")))
    rabbitmq.evaluate(f"ok = rabbit_policy:parse_set({fields}).")
    try:
        yield
    finally:
        rabbitmq.evaluate(f'rabbit_policy:delete(<<"/">>, {_binary(name)}, <<"test">>).')


def add_user(rabbitmq: RabbitMQ, name: str, password: str) -> None:
    """Add a user with all rights on the default virtual host."""
    user = _binary(name)
    rabbitmq.evaluate(
        f'ok = rabbit_auth_backend_internal:add_user({user}, {_binary(password)}, <<"test">>), '
        f'ok = rabbit_auth_backend_internal:set_permissions({user}, <<"/">>, {ANY}, {ANY}, {ANY}, <<"test">>).'
    )


def wait_for_acks(rabbitmq: RabbitMQ, timeout_seconds: float, tick_seconds: float) -> None:
    """Set the broker's wait for an ack, and how often it looks, on the channels that are opened from now on."""
    rabbitmq.evaluate(
        f"application:set_env(rabbit, consumer_timeout, {int(timeout_seconds * 1000)}), "
        f"application:set_env(rabbit, channel_tick_interval, {int(tick_seconds * 1000)})."
    )
