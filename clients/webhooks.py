"""The backend's webhooks: one call is one HTTP attempt, judged. Whether to try again is the caller's to decide."""

import base64
import hashlib
import hmac
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import Enum, StrEnum, auto
from http.cookiejar import DefaultCookiePolicy
from typing import Any, NamedTuple

import requests
import urllib3.exceptions
from requests.adapters import HTTPAdapter
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from clients.deadline import Watch, deadline, guarded_pools
from config.backend import BackendSettings

DEADLINE_SECONDS = 20.0
CONNECT_TIMEOUT_SECONDS = 5.0
# Read only so that the connection can be used again; a longer body is cut off with its connection.
MAX_BODY_BYTES = 64 * 1024
MAX_RETRY_AFTER_SECONDS = 3600.0
NOT_FOUND = 404
SECRET_PREFIX = "whsec_"  # noqa: S105 - the marker, not a secret

# 401 and 403 are a token being rotated, 404 a generation not committed yet: all may be well in a minute.
RETRY_STATUSES = frozenset({401, 403, 404, 408, 425, 429})

_VISIBLE_ASCII = re.compile(r"[\x21-\x7e]+")
_POOLS = guarded_pools(HTTPConnectionPool, HTTPSConnectionPool)
_SECONDS = re.compile(r"[0-9]+")


class BackendUnreachable(Exception):
    """The backend gave no answer; the message says how that ended."""


class WebhookKind(StrEnum):
    """What a webhook tells the backend."""

    PROGRESS = "progress"
    COMPLETE = "complete"
    FAILED = "failed"


class _Route(NamedTuple):
    method: str
    path: str


ROUTES: dict[WebhookKind, _Route] = {
    WebhookKind.PROGRESS: _Route("PATCH", "/api/webhooks/inference/progress"),
    WebhookKind.COMPLETE: _Route("POST", "/api/webhooks/inference/complete"),
    WebhookKind.FAILED: _Route("POST", "/api/webhooks/inference/failed"),
}


@dataclass(frozen=True)
class Webhook:
    """One event. `webhook_id` stays the same over all attempts; `body` must be JSON without NaN, else `ValueError`."""

    kind: WebhookKind
    webhook_id: str
    body: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not _VISIBLE_ASCII.fullmatch(self.webhook_id):
            raise ValueError("webhook_id must be visible ASCII characters: it travels as a header")

    @property
    def payload(self) -> bytes:
        """The body as it is sent and signed: the same bytes at every attempt."""
        # Sorted: an event that comes back from the ledger or the outbox has its keys in another order.
        return json.dumps(dict(self.body), separators=(",", ":"), allow_nan=False, sort_keys=True).encode()


class Verdict(Enum):
    """What one attempt came to."""

    DELIVERED = auto()  # the backend answered 2xx
    RETRY = auto()  # it may take the same webhook later
    REJECTED = auto()  # it will never take this webhook


@dataclass(frozen=True)
class Attempt:
    """How one attempt ended. `reason` is short and holds no secret.

    `status` is None where no answer came. `is_ambiguous`: the backend may have acted on it, though no answer says so.
    """

    verdict: Verdict
    status: int | None
    retry_after_seconds: float | None
    reason: str
    is_ambiguous: bool


class WebhookClient:
    """Owns one session a thread; thread-safe. Reads no proxy, netrc or cookie, and follows no redirect."""

    def __init__(self, settings: BackendSettings, *, now: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._now = now
        secret = settings.signing_secret
        self._signing_key = None if secret is None else signing_key(secret.get_secret_value())
        self._sessions = threading.local()

    def send(self, webhook: Webhook, *, deadline_seconds: float = DEADLINE_SECONDS) -> Attempt:
        """Make exactly one HTTP attempt, over within `deadline_seconds`; network and HTTP errors become the verdict."""
        route, payload = ROUTES[webhook.kind], webhook.payload
        request = requests.Request(
            route.method,
            self._settings.base_url + route.path,
            data=payload,
            headers=self._headers(webhook.webhook_id, payload),
        )
        return self._send(request, deadline_seconds)

    def _send(self, request: requests.Request, deadline_seconds: float) -> Attempt:
        with deadline(deadline_seconds) as watch:
            try:
                return self._attempt(request, watch)
            except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                return _unanswered(error, watch)

    def _attempt(self, request: requests.Request, watch: Watch) -> Attempt:
        session = self._session()
        # No read timeout: it would race with the watch, which ends silence and drips alike.
        timeout = (min(CONNECT_TIMEOUT_SECONDS, watch.seconds), None)
        prepared = session.prepare_request(request)
        # Not by the session, which reads the whole body of a redirect, and raises for a `Location` that it cannot read.
        adapter = session.get_adapter(request.url)
        response = adapter.send(prepared, timeout=timeout, stream=True)
        if watch.is_expired:
            # The headers were cut off, which http.client takes for their end.
            response.close()
            return _unanswered(None, watch)
        _drain(response)
        return judge(response.status_code, response.headers, self._now())

    def _session(self) -> requests.Session:
        if not hasattr(self._sessions, "session"):
            self._sessions.session = _new_session(self._settings.token.get_secret_value())
        session: requests.Session = self._sessions.session
        return session

    def _headers(self, webhook_id: str, payload: bytes) -> dict[str, str]:
        timestamp = int(self._now())
        headers = {
            "Content-Type": "application/json",
            "webhook-id": webhook_id,
            "webhook-timestamp": str(timestamp),
        }
        if self._signing_key is not None:
            headers["webhook-signature"] = signature(self._signing_key, webhook_id, timestamp, payload)
        return headers


class Reach(NamedTuple):
    """The statuses that a GET of a webhook's address gets, which reports nothing: with our token, and with none.

    `other_status` tells more where there is a doubt: for a 404 what OPTIONS gets there, for a 2xx what a GET gets below
    that address, where nothing is.
    """

    status: int
    stranger_status: int
    other_status: int | None = None


def reach(settings: BackendSettings) -> Reach:
    """Ask the backend without telling it anything; raises `BackendUnreachable` where no answer comes."""
    client, url = WebhookClient(settings), settings.base_url + ROUTES[WebhookKind.COMPLETE].path

    def status_of(method: str, url: str, headers: Mapping[str, str | None]) -> int:
        attempt = client._send(requests.Request(method, url, headers=headers), DEADLINE_SECONDS)
        if attempt.status is None:
            raise BackendUnreachable(attempt.reason)
        return attempt.status

    # None takes the session's own header out.
    status, stranger_status = status_of("GET", url, {}), status_of("GET", url, {"Authorization": None})
    other_status = None
    if status == NOT_FOUND:
        other_status = status_of("OPTIONS", url, {})
    elif 200 <= status < 300:
        other_status = status_of("GET", f"{url}/darkroom-check", {})
    return Reach(status, stranger_status, other_status)


def judge(status: int, headers: Mapping[str, str], now: float) -> Attempt:
    """The attempt that an answer with `status` makes; `headers` are looked up as given, `now` is Unix seconds."""
    if 200 <= status < 300:
        return Attempt(Verdict.DELIVERED, status, None, f"HTTP {status}", False)
    if status in RETRY_STATUSES or status >= 500:
        wait = _retry_after_seconds(headers.get("Retry-After"), now)
        return Attempt(Verdict.RETRY, status, wait, f"HTTP {status}", False)
    if 300 <= status < 400:
        reason = f"HTTP {status}: a redirect, which is never followed; set BACKEND_API_URL to the final address"
        return Attempt(Verdict.REJECTED, status, None, reason, False)
    return Attempt(Verdict.REJECTED, status, None, f"HTTP {status}", False)


def signing_key(secret: str) -> bytes:
    """The HMAC key of a Standard Webhooks secret: base64 behind `whsec_`, else the characters themselves."""
    if secret.startswith(SECRET_PREFIX):
        return base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    return secret.encode()


def signature(key: bytes, webhook_id: str, timestamp: int, payload: bytes) -> str:
    """Standard Webhooks' `v1` signature: HMAC-SHA256 over `id.timestamp.payload`, in base64."""
    signed = f"{webhook_id}.{timestamp}.".encode() + payload
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


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
    adapter = HTTPAdapter(pool_connections=1, pool_maxsize=1, max_retries=0)
    adapter.poolmanager.pool_classes_by_scheme = _POOLS
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


def _drain(response: requests.Response) -> None:
    """Read a short body to its end, so that the connection can be used again; the status alone has the verdict."""
    num_bytes = 0
    try:
        while num_bytes < MAX_BODY_BYTES and (chunk := response.raw.read1(MAX_BODY_BYTES, decode_content=False)):
            num_bytes += len(chunk)
    except urllib3.exceptions.HTTPError:
        # Broken, or cut off by the deadline: the answer's first line has been read, and that is what counts.
        return
    finally:
        response.close()


def _unanswered(error: Exception | None, watch: Watch) -> Attempt:
    if watch.is_expired:
        reason = f"no answer within {watch.seconds:g} s"
    elif watch.was_sent:
        reason = f"the connection broke before the answer ({_root_name(error)})"
    else:
        reason = f"no connection ({_root_name(error)})"
    return Attempt(Verdict.RETRY, None, None, reason, watch.was_sent)


def _root_name(error: BaseException | None) -> str:
    """The innermost cause's class: the messages around it repeat the URL."""
    while error is not None and error.__context__ is not None:
        error = error.__context__
    return type(error).__name__


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
