"""Client of the backend's webhooks: one call makes one HTTP attempt and classifies it. `worker.results` retries."""

import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from enum import Enum, StrEnum, auto
from http.cookiejar import DefaultCookiePolicy
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import requests
import urllib3.exceptions
from requests.adapters import HTTPAdapter
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from clients.deadline import DeadlineTimer, deadline, guarded_pools
from clients.webhook_signature import sign_payload, signing_key
from config.backend import BackendSettings

DEADLINE_SECONDS = 20.0
CONNECT_TIMEOUT_SECONDS = 5.0
# Read only so that the connection can be used again; a longer body is cut off with its connection.
MAX_BODY_BYTES = 64 * 1024
MAX_RETRY_AFTER_SECONDS = 3600.0

# 401 and 403 are a token being rotated, 404 a generation not committed yet: all may be well in a minute.
RETRY_STATUSES = frozenset({401, 403, 404, 408, 425, 429})
NO_SUCH_METHOD_STATUSES = frozenset({405, 501})

DEFAULT_SETTING = "BACKEND_API_URL"
PORTS = {"http": 80, "https": 443}

_VISIBLE_ASCII = re.compile(r"[\x21-\x7e]+")
_POOLS = guarded_pools(HTTPConnectionPool, HTTPSConnectionPool)
_SECONDS = re.compile(r"[0-9]+")


class WebhookKind(StrEnum):
    """What a webhook reports to the backend."""

    PROGRESS = "progress"
    COMPLETE = "complete"
    FAILED = "failed"


class Route(NamedTuple):
    """How webhooks of one kind are sent. `setting` is the variable that says where; a shared address, which takes every
    kind, finds the kind as `type` in the body."""

    method: str
    url: str
    setting: str
    is_shared: bool

    @property
    def origin(self) -> tuple[str, str, int]:
        """Scheme, host and port of the address, as in RFC 6454."""
        parts = urlsplit(self.url)
        return parts.scheme, parts.hostname or "", parts.port or PORTS[parts.scheme]


DEFAULT_ROUTES: dict[WebhookKind, tuple[str, str]] = {
    WebhookKind.PROGRESS: ("PATCH", "/api/webhooks/inference/progress"),
    WebhookKind.COMPLETE: ("POST", "/api/webhooks/inference/complete"),
    WebhookKind.FAILED: ("POST", "/api/webhooks/inference/failed"),
}


def route_of(settings: BackendSettings, kind: WebhookKind) -> Route:
    """Return the kind's route: by its own setting, else to the shared address, else by its default path."""
    own = {
        WebhookKind.PROGRESS: settings.progress_url,
        WebhookKind.COMPLETE: settings.complete_url,
        WebhookKind.FAILED: settings.failed_url,
    }[kind]
    method, path = DEFAULT_ROUTES[kind]
    is_shared = own is None and settings.webhook_url is not None
    if kind is WebhookKind.PROGRESS:
        method = settings.progress_method or ("POST" if is_shared else method)
    if own is not None:
        return Route(method, settings.address_of(own), f"WEBHOOK_{kind.name}_URL", is_shared)
    if settings.webhook_url is not None:
        return Route(method, settings.address_of(settings.webhook_url), "WEBHOOK_URL", is_shared)
    return Route(method, settings.base_url + path, DEFAULT_SETTING, is_shared)


@dataclass(frozen=True)
class Webhook:
    """One event. `webhook_id` stays the same over all attempts; `body` must be JSON without NaN, else `ValueError`.

    `trace_headers` tell the backend which trace the call belongs to.
    """

    kind: WebhookKind
    webhook_id: str
    body: Mapping[str, Any]
    trace_headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _VISIBLE_ASCII.fullmatch(self.webhook_id):
            raise ValueError("webhook_id must be visible ASCII characters: it travels as a header")

    @property
    def payload(self) -> bytes:
        """The body as sent and signed: the same bytes for the same body."""
        # Sorted: an event that comes back from the ledger or the outbox has its keys in another order.
        return json.dumps(dict(self.body), separators=(",", ":"), allow_nan=False, sort_keys=True).encode()


class WebhookResult(Enum):
    """Classification of one attempt."""

    DELIVERED = auto()  # the backend answered 2xx
    RETRY = auto()  # it may accept the same webhook later
    REJECTED = auto()  # it will never accept this webhook


@dataclass(frozen=True)
class WebhookAttempt:
    """One attempt's result. `reason` is short and holds no secret.

    `status` is None where no response came. `is_ambiguous`: the backend may have acted on it, without a response.
    `setting` is the variable that says where it went.
    """

    result: WebhookResult
    status: int | None
    retry_after_seconds: float | None
    reason: str
    is_ambiguous: bool
    setting: str = DEFAULT_SETTING


class WebhookClient:
    """Owner of one session a thread; thread-safe. Uses no proxy, netrc or cookie, and follows no redirect."""

    def __init__(self, settings: BackendSettings, *, now: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._routes = {kind: route_of(settings, kind) for kind in WebhookKind}
        self._now = now
        secret = settings.signing_secret
        self._signing_key = None if secret is None else signing_key(secret.get_secret_value())
        self._sessions = threading.local()

    def send(self, webhook: Webhook, *, deadline_seconds: float = DEADLINE_SECONDS) -> WebhookAttempt:
        """Make exactly one HTTP attempt, over within `deadline_seconds`; network and HTTP errors become its result."""
        route = self._routes[webhook.kind]
        if route.is_shared:
            webhook = replace(webhook, body={"type": webhook.kind.value, **webhook.body})
        payload = webhook.payload
        timestamp = int(self._now())
        headers = dict(webhook.trace_headers) | {
            "Content-Type": "application/json",
            "webhook-id": webhook.webhook_id,
            "webhook-timestamp": str(timestamp),
        }
        if self._signing_key is not None:
            signature = sign_payload(self._signing_key, webhook.webhook_id, timestamp, payload)
            headers["webhook-signature"] = signature
        request = requests.Request(route.method, route.url, data=payload, headers=headers)
        attempt = self.send_request(request, deadline_seconds=deadline_seconds)
        return replace(attempt, reason=_with_advice(attempt, route), setting=route.setting)

    def send_request(self, request: requests.Request, *, deadline_seconds: float = DEADLINE_SECONDS) -> WebhookAttempt:
        """Make one HTTP attempt with any request, over this client's sessions."""
        with deadline(deadline_seconds) as timer:
            try:
                return self._attempt(request, timer)
            except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                return _without_response(error, timer)

    def _attempt(self, request: requests.Request, timer: DeadlineTimer) -> WebhookAttempt:
        if not hasattr(self._sessions, "session"):
            self._sessions.session = _new_session(self._settings.token.get_secret_value())
            self._sessions.bare = {}
        session: requests.Session = self._sessions.session
        # No read timeout: it would race with the deadline, which ends pauses and slow streams alike.
        timeout = (min(CONNECT_TIMEOUT_SECONDS, timer.seconds), None)
        prepared = _prepare(request, session, self._sessions.bare)
        # Not by the session, which reads the whole body of a redirect, and raises for a `Location` that it cannot read.
        adapter = session.get_adapter(request.url)
        response = adapter.send(prepared, timeout=timeout, stream=True)
        if timer.is_expired:
            # The headers were cut off, which http.client takes for their end.
            response.close()
            return _without_response(None, timer)
        _drain_body(response)
        return classify(response.status_code, response.headers, self._now())


def classify(status: int, headers: Mapping[str, str], now: float) -> WebhookAttempt:
    """Return the attempt for a response with `status`; `headers` are looked up as given, `now` is Unix seconds."""
    if 200 <= status < 300:
        return WebhookAttempt(WebhookResult.DELIVERED, status, None, f"HTTP {status}", False)
    if status in RETRY_STATUSES or status >= 500:
        wait = _retry_after_seconds(headers.get("Retry-After"), now)
        return WebhookAttempt(WebhookResult.RETRY, status, wait, f"HTTP {status}", False)
    return WebhookAttempt(WebhookResult.REJECTED, status, None, f"HTTP {status}", False)


def _with_advice(attempt: WebhookAttempt, route: Route) -> str:
    """Return the attempt's reason, with what to set where a status shows a wrong setting."""
    if attempt.status is not None and 300 <= attempt.status < 400:
        return f"{attempt.reason}: a redirect, which is never followed; set {route.setting} to the final address"
    if attempt.status in NO_SUCH_METHOD_STATUSES and route.method == "PATCH":
        return f"{attempt.reason} to PATCH: set WEBHOOK_PROGRESS_METHOD=POST where a gateway passes no PATCH"
    return attempt.reason


def _new_session(token: str) -> requests.Session:
    session = requests.Session()
    session.trust_env = False
    session.headers.update(
        {
            "Authorization": f"Bearer {token}",
            "X-Request-Source": "inference-server",
            "User-Agent": "darkroom",
            "Accept-Encoding": "identity",
        }
    )
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    # The kinds may have hosts of their own.
    adapter = HTTPAdapter(pool_connections=len(WebhookKind), pool_maxsize=1, max_retries=0)
    adapter.poolmanager.pool_classes_by_scheme = _POOLS
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


def _prepare(
    request: requests.Request, session: requests.Session, bare: dict[tuple[str, str], requests.PreparedRequest]
) -> requests.PreparedRequest:
    """Return the request with the session's headers, without those that it has as None. `bare` keeps what was prepared
    for its method and address: checking and merging them again would be a quarter of a call's CPU."""
    key = (request.method, request.url)
    if key not in bare:
        bare[key] = session.prepare_request(requests.Request(*key))
    prepared = bare[key].copy()
    headers = {**prepared.headers, **request.headers}
    prepared.prepare_headers({name: value for name, value in headers.items() if value is not None})
    prepared.prepare_body(request.data, None)
    return prepared


def _drain_body(response: requests.Response) -> None:
    """Read a short body to its end, so that the connection can be used again; the status alone decides."""
    num_bytes = 0
    try:
        while num_bytes < MAX_BODY_BYTES and (chunk := response.raw.read1(MAX_BODY_BYTES, decode_content=False)):
            num_bytes += len(chunk)
    except urllib3.exceptions.HTTPError:
        # Broken, or cut off by the deadline: the status line has been read, and that is what counts.
        return
    finally:
        response.close()


def _without_response(error: BaseException | None, timer: DeadlineTimer) -> WebhookAttempt:
    # The innermost cause: the messages around it repeat the URL.
    while error is not None and error.__context__ is not None:
        error = error.__context__
    if timer.is_expired:
        reason = f"no answer within {timer.seconds:g} s"
    elif timer.was_sent:
        reason = f"the connection broke before the answer ({type(error).__name__})"
    else:
        reason = f"no connection ({type(error).__name__})"
    return WebhookAttempt(WebhookResult.RETRY, None, None, reason, timer.was_sent)


def _retry_after_seconds(value: str | None, now: float) -> float | None:
    if value is None:
        return None
    if _SECONDS.fullmatch(value.strip(" ")):
        return min(float(value), MAX_RETRY_AFTER_SECONDS)
    try:
        moment = parsedate_to_datetime(value).timestamp()
    except (ValueError, OverflowError):
        return None
    return min(max(moment - now, 0.0), MAX_RETRY_AFTER_SECONDS)
