"""Probe the backend's webhook address with requests that report nothing."""

from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

import requests

from clients.webhooks import Route, WebhookClient
from config.backend import BackendSettings

NOT_FOUND = 404


class BackendUnreachable(Exception):
    """The backend gave no answer; the message has the cause."""


class BackendProbe(NamedTuple):
    """The statuses of a GET of a webhook's address, with our token and without one.

    `follow_up_status` resolves a doubt: after a 404 the status of OPTIONS there, after a 2xx that of a GET below that
    address, where no route is.
    """

    status: int
    unauthenticated_status: int
    follow_up_status: int | None = None


def probe_backend(settings: BackendSettings, route: Route) -> BackendProbe:
    """Send the probe requests to the route's address; raise `BackendUnreachable` where no answer comes."""
    client, url = WebhookClient(settings), route.url

    def status_of(method: str, url: str, headers: Mapping[str, str | None]) -> int:
        attempt = client.send_request(requests.Request(method, url, headers=headers))
        if attempt.status is None:
            raise BackendUnreachable(attempt.reason)
        return attempt.status

    # None removes the session's own header.
    status, unauthenticated_status = status_of("GET", url, {}), status_of("GET", url, {"Authorization": None})
    follow_up_status = None
    if status == NOT_FOUND:
        follow_up_status = status_of("OPTIONS", url, {})
    elif 200 <= status < 300:
        parts = urlsplit(url)
        below = parts._replace(path=f"{parts.path.rstrip('/')}/darkroom-check").geturl()
        follow_up_status = status_of("GET", below, {})
    return BackendProbe(status, unauthenticated_status, follow_up_status)
