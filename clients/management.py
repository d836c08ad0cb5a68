"""RabbitMQ's management API, the only source of the policies in effect for a queue."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import requests

# The plugin's default port without TLS: used beside plain AMQP only, which sends the password in the clear as well.
MANAGEMENT_PORT = 15672
TIMEOUT_SECONDS = 3.0


def effective_policies(
    host: str, virtual_host: str, *, user: str, password: str, port: int = MANAGEMENT_PORT
) -> Mapping[str, Mapping[str, Any]]:
    """Return each queue's effective policy definition by its name; empty where the API is unreachable or refuses."""
    session = requests.Session()
    session.trust_env = False  # neither a proxy nor a .netrc
    session.auth = (user, password)
    url = f"http://{host}:{port}/api/queues/{quote(virtual_host, safe='')}"
    with session:
        try:
            answer = session.get(url, timeout=TIMEOUT_SECONDS, allow_redirects=False)
            if answer.status_code != requests.codes.ok:
                return {}
            return {queue["name"]: dict(queue.get("effective_policy_definition") or {}) for queue in answer.json()}
        except (requests.RequestException, ValueError, TypeError, KeyError, AttributeError):
            return {}  # another service listens on the port
