"""The S3 client underneath `Storage`: boto3 with every default that matters written down, and a hard deadline."""

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import boto3
from botocore.awsrequest import AWSHTTPConnectionPool, AWSHTTPSConnectionPool
from botocore.config import Config
from botocore.httpsession import URLLib3Session

from clients.deadline import current_watch, guarded_pools
from clients.storage.errors import ObjectDamaged
from clients.storage.google import GoogleDialect
from clients.storage.location import ObjectRef
from config.store import StoreSettings

CONNECT_TIMEOUT_SECONDS = 5.0
# The longest silence between two bytes; the whole call ends by its `deadline`.
READ_TIMEOUT_SECONDS = 10.0
MAX_ATTEMPTS = 4
# One for each job's thread, or threads throw connections away and shake hands again.
MAX_CONNECTIONS = 32

# Proxies that pack bodies weaken ETags so; a condition on a weak one is never met (RFC 9110 13.1.1).
WEAK = "W/"
_PLAIN_MD5 = re.compile(r"[0-9a-f]{32}")


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
    client.meta.events.register("before-send.s3", _Transport(_dialect(settings)).answer)
    return client


@dataclass(frozen=True, slots=True)
class Content:
    """An object to be written. `metadata` is ASCII; `cache_control` is what its readers are told by that header."""

    body: bytes
    content_type: str
    metadata: Mapping[str, str]
    cache_control: str | None = None


def put_object(client: Any, ref: ObjectRef, content: Content, **condition: str) -> bool:
    """Write the object in one request with its SHA-256; True where the answer confirms it.

    Every store tells the ETag of what it wrote. An interim answer and a proxy's page have none.
    """
    options = {} if content.cache_control is None else {"CacheControl": content.cache_control}
    answer = client.put_object(
        Bucket=ref.bucket,
        Key=ref.key,
        Body=content.body,
        ContentType=content.content_type,
        ChecksumSHA256=base64.b64encode(hashlib.sha256(content.body).digest()).decode(),
        Metadata=dict(content.metadata),
        **options,
        **condition,
    )
    return "ETag" in answer


def etag_of(answer: Mapping[str, Any]) -> str:
    """The ETag without its quotes; a weak one keeps its `W/`."""
    text = str(answer["ETag"])
    return WEAK * text.startswith(WEAK) + text.removeprefix(WEAK).strip('"')


class DigestCheck:
    """Compares what arrives of one object, try by try, with the MD5 that its store tells in one way or another."""

    def __init__(self, ref: ObjectRef) -> None:
        self._ref = ref
        self._refused: set[str] = set()

    def refuse_damage(self, answer: Mapping[str, Any], md5: str) -> None:
        """Raise `ObjectDamaged` where the body of the answer to a GET, whose MD5 is `md5`, is not the object's."""
        told = _md5s_told(answer)
        if told:
            self._raise_unless(md5 in told, md5, told[0])
            return
        etag = etag_of(answer).removeprefix(WEAK)
        # Damage on the way is not the same twice; the store's own bytes are, and then its ETag is no MD5.
        is_right = not _may_be_md5(etag, answer) or md5 == etag or md5 in self._refused
        self._refused.add(md5)
        self._raise_unless(is_right, md5, etag)

    def _raise_unless(self, is_right: bool, md5: str, expected: str) -> None:
        if not is_right:
            raise ObjectDamaged(f"{self._ref}: its MD5 is {md5}, not {expected}")


def _md5s_told(answer: Mapping[str, Any]) -> list[str]:
    """What headers made for it say of the body, in hex."""
    headers = answer["ResponseMetadata"].get("HTTPHeaders", {})
    told = []
    for text in (headers.get("content-md5", ""), *_google_md5s(headers.get("x-goog-hash", ""))):
        with suppress(binascii.Error):  # some proxy's header, not a checksum
            told.append(base64.b64decode(text, validate=True).hex())
    return [md5 for md5 in told if _PLAIN_MD5.fullmatch(md5)]


def _may_be_md5(etag: str, answer: Mapping[str, Any]) -> bool:
    # Under KMS or a customer's key the ETag looks like an MD5 and is none; under plain AES256 it is one.
    is_opaque = answer.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in answer
    return not is_opaque and _PLAIN_MD5.fullmatch(etag) is not None


def _google_md5s(header: str) -> list[str]:
    """`crc32c=n03x6A==,md5=Ojk9c3dhfxgoKVVHYwFbHQ==`; an object composed of others has no MD5."""
    return [part.strip().removeprefix("md5=") for part in header.split(",") if part.strip().startswith("md5=")]


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


def _dialect(settings: StoreSettings) -> GoogleDialect | None:
    """Google's, for a store that may turn out to be Google's; only its HMAC keys can sign in it."""
    if settings.access_key_id is None or settings.secret_access_key is None:
        return None
    secret = settings.secret_access_key.get_secret_value()
    return GoogleDialect(settings.endpoint_url, settings.access_key_id, secret)


class _Transport:
    """botocore's transport without proxies, and with connections that the current deadline can end."""

    def __init__(self, dialect: GoogleDialect | None) -> None:
        self._dialect = dialect
        session_class: Any = URLLib3Session
        self._session = session_class(
            verify=os.environ.get("AWS_CA_BUNDLE") or True,
            timeout=(CONNECT_TIMEOUT_SECONDS, READ_TIMEOUT_SECONDS),
            max_pool_connections=MAX_CONNECTIONS,
        )
        self._session._manager.pool_classes_by_scheme = guarded_pools(AWSHTTPConnectionPool, AWSHTTPSConnectionPool)

    def answer(self, request: Any, **_event: Any) -> Any:
        """Send `request`; raises `DeadlineExpired`, which botocore does not retry, when the time is over."""
        if self._dialect is None:
            return self._send(request)
        self._dialect.put_request(request)
        answer = self._send(request)
        self._dialect.put_answer(answer)
        return answer

    def _send(self, request: Any) -> Any:
        watch = current_watch()
        if watch is None:
            return self._session.send(request)
        watch.refuse_if_expired()
        try:
            return self._session.send(request)
        finally:
            # Also over an answer: one cut off inside its headers looks complete.
            watch.refuse_if_expired()
