"""RabbitMQ's management interface: the one place that tells which policies hold for a queue."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import requests

# The plugin's usual port, beside a plain AMQP port, where the password is no better hidden.
MANAGEMENT_PORT = 15672
TIMEOUT_SECONDS = 3.0


def effective_policies(
    host: str, virtual_host: str, *, user: str, password: str, port: int = MANAGEMENT_PORT
) -> Mapping[str, Mapping[str, Any]]:
    """The definition that policies and operator policies come to, by queue; nothing where nobody answers, or not us."""
    session = requests.Session()
    session.trust_env = False  # neither a proxy nor a .netrc
    session.auth = (user, password)
    place = f"http://{host}:{port}/api/queues/{quote(virtual_host, safe='')}"
    with session:
        try:
            answer = session.get(place, timeout=TIMEOUT_SECONDS, allow_redirects=False)
            if answer.status_code != requests.codes.ok:
                return {}
            return {queue["name"]: dict(queue.get("effective_policy_definition") or {}) for queue in answer.json()}
        except (requests.RequestException, ValueError, TypeError, KeyError, AttributeError):
            return {}  # another service has the port
