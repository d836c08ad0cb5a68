"""The boto3 client underneath `Storage`: every default that matters is explicit, and calls end by their deadline."""

import os
from typing import Any, NamedTuple

import boto3
import botocore.session
from botocore.awsrequest import AWSHTTPConnectionPool, AWSHTTPSConnectionPool
from botocore.config import Config
from botocore.httpsession import URLLib3Session
from botocore.loaders import Loader

from clients.deadline import current_timer, guarded_pools
from clients.storage.google import GoogleXmlApi
from config.store import StoreSettings

CONNECT_TIMEOUT_SECONDS = 5.0
# The longest pause between two bytes; the whole call ends by its `deadline`.
READ_TIMEOUT_SECONDS = 10.0
MAX_ATTEMPTS = 4
# One for each job's thread, or threads close connections and repeat the TLS handshake.
MAX_CONNECTIONS = 32
# botocore's descriptions of S3, which each session of its own would read again: a tenth of a second.
DESCRIPTIONS = Loader()


class S3Client(NamedTuple):
    """The thread-safe boto3 client, botocore's credentials (None where there are none), and the Google translation."""

    client: Any
    credentials: Any
    google: GoogleXmlApi | None


def s3_client(settings: StoreSettings) -> S3Client:
    """Return the client of the configured store. Proxies and endpoints of the environment are ignored.

    The Google translation is for a store that may turn out to be Google's; only its HMAC keys can sign for it.
    """
    key_id = settings.access_key_id
    secret = None if settings.secret_access_key is None else settings.secret_access_key.get_secret_value()
    options: dict[str, Any] = {
        "signature_version": "s3v4",
        "retries": {"mode": "standard", "total_max_attempts": MAX_ATTEMPTS},
        "s3": {"addressing_style": "path" if settings.endpoint_url else "auto"},
        # Optional checksums travel as trailers of chunked bodies, which many compatible stores refuse.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        "ignore_configured_endpoint_urls": True,
        # Whole: botocore would build its own twice for each call, an eighth of the call's CPU.
        "user_agent": "darkroom",
    }
    # boto3 reads no token from the environment beside a key that it is given.
    token = settings.session_token.get_secret_value() if key_id and settings.session_token else None
    core = botocore.session.get_session()
    core.register_component("data_loader", DESCRIPTIONS)
    session = boto3.session.Session(key_id, secret, token, botocore_session=core)
    client = session.client(
        "s3", region_name=settings.region, endpoint_url=settings.endpoint_url, config=Config(**options)
    )
    google = None if key_id is None or secret is None else GoogleXmlApi(settings.endpoint_url, key_id, secret)
    # A handler of `before-send` that returns a response replaces botocore's own transport.
    client.meta.events.register("before-send.s3", _Transport(google).send)
    return S3Client(client, session.get_credentials(), google)


class _Transport:
    """botocore's transport without proxies, over connections that the current deadline can end."""

    def __init__(self, google: GoogleXmlApi | None) -> None:
        self._google = google
        session_class: Any = URLLib3Session
        self._session = session_class(
            verify=os.environ.get("AWS_CA_BUNDLE") or True,
            timeout=(CONNECT_TIMEOUT_SECONDS, READ_TIMEOUT_SECONDS),
            max_pool_connections=MAX_CONNECTIONS,
        )
        self._session._manager.pool_classes_by_scheme = guarded_pools(AWSHTTPConnectionPool, AWSHTTPSConnectionPool)

    def send(self, request: Any, **_event: Any) -> Any:
        """Send `request`; raise `DeadlineExpired`, which botocore does not retry, when the time is over."""
        if self._google is None:
            return self._send(request)
        self._google.translate_request(request)
        response = self._send(request)
        self._google.translate_response(response)
        return response

    def _send(self, request: Any) -> Any:
        timer = current_timer()
        if timer is None:
            return self._session.send(request)
        timer.raise_if_expired()
        try:
            return self._session.send(request)
        finally:
            # Also over a response: one cut off inside its headers looks complete.
            timer.raise_if_expired()
