"""The S3 client underneath `Storage`: boto3 with every default that matters written down, and a hard deadline."""

import os
from typing import Any

import boto3
from botocore.awsrequest import AWSHTTPConnectionPool, AWSHTTPSConnectionPool
from botocore.config import Config
from botocore.httpsession import URLLib3Session

from clients.deadline import current_watch, guarded_pools
from config.settings import StoreSettings

CONNECT_TIMEOUT_SECONDS = 5.0
# The longest silence between two bytes; the whole call ends by its `deadline`.
READ_TIMEOUT_SECONDS = 10.0
MAX_ATTEMPTS = 4
# One for each job's thread, or threads throw connections away and shake hands again.
MAX_CONNECTIONS = 32


def s3_client(settings: StoreSettings) -> Any:
    """A thread-safe boto3 client of the configured store. Proxies and endpoints of the environment are ignored."""
    secret = settings.secret_access_key
    client = boto3.session.Session().client(
        "s3",
        region_name=settings.region,
        endpoint_url=settings.endpoint_url,
        aws_access_key_id=settings.access_key_id,
        aws_secret_access_key=None if secret is None else secret.get_secret_value(),
        config=_config(settings),
    )
    # A handler of `before-send` that answers takes the place of botocore's own transport.
    client.meta.events.register("before-send.s3", _Transport().answer)
    return client


def _config(settings: StoreSettings) -> Any:
    options: dict[str, Any] = {
        "signature_version": "s3v4",
        "retries": {"mode": "standard", "total_max_attempts": MAX_ATTEMPTS},
        "s3": {"addressing_style": "path" if settings.endpoint_url else "auto"},
        # Checksums that nobody asked for travel as trailers of chunked bodies, which many compatible stores refuse.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        "ignore_configured_endpoint_urls": True,
        "user_agent_extra": "darkroom",
    }
    return Config(**options)


class _Transport:
    """botocore's transport without proxies, and with connections that the current deadline can end."""

    def __init__(self) -> None:
        session_class: Any = URLLib3Session
        self._session = session_class(
            verify=os.environ.get("AWS_CA_BUNDLE") or True,
            timeout=(CONNECT_TIMEOUT_SECONDS, READ_TIMEOUT_SECONDS),
            max_pool_connections=MAX_CONNECTIONS,
        )
        self._session._manager.pool_classes_by_scheme = guarded_pools(AWSHTTPConnectionPool, AWSHTTPSConnectionPool)

    def answer(self, request: Any, **_event: Any) -> Any:
        """Send `request`; raises `DeadlineExpired`, which botocore does not retry, when the time is over."""
        watch = current_watch()
        if watch is None:
            return self._session.send(request)
        watch.refuse_if_expired()
        try:
            return self._session.send(request)
        finally:
            # Also over an answer: one cut off inside its headers looks complete.
            watch.refuse_if_expired()
