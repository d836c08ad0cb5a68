"""The store, real where it works, and imitated on a socket where it must misbehave."""

import hashlib
import socket
import ssl
import time
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import urllib3.exceptions
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from pydantic import SecretStr

import clients.storage.download
from clients.deadline import DeadlineExpired
from clients.storage.client import Storage
from clients.storage.download import MIN_RATE_BYTES_PER_SECOND, RATE_WINDOW_SECONDS, RateMonitor
from clients.storage.errors import (
    AccessDenied,
    BucketNotFound,
    NotAStore,
    NotSupported,
    ObjectChanged,
    ObjectDamaged,
    ObjectNotFound,
    ObjectTooLarge,
    StorageError,
    StorageUnavailable,
    WriteConflict,
    translate_errors,
)
from clients.storage.location import ObjectRef, parse_location
from clients.storage.objects import ObjectStat
from config.store import StoreSettings
from tests.support.servers.clients_servers import (
    AnsweringServer,
    DrippingHandshakeServer,
    DrippingServer,
    ResettingServer,
    Server,
    SilentServer,
    answer,
    body_of,
    header,
    refused_url,
)

SECRET = "canary-secret-8c2d"
MISSING = ObjectRef("media", "models/missing.safetensors")
BODY = b"x" * 10_000
ETAG = f'"{hashlib.md5(BODY, usedforsecurity=False).hexdigest()}"'
STAT = ObjectStat(ETAG.strip('"'), len(BODY))
WHOLE = answer(200, BODY, ETag=ETAG)
SLOW_DOWN = answer(503, b"<Error><Code>SlowDown</Code></Error>")


def settings_of(url: str, **others: Any) -> StoreSettings:
    names = {"AWS_STORAGE_BUCKET_NAME": "media", "AWS_S3_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "key"}
    return StoreSettings(**{**names, "AWS_SECRET_ACCESS_KEY": SecretStr(SECRET), **others})


def storage_at(server: Server) -> Storage:
    return Storage(settings_of(server.url))


@pytest.fixture
def storage(store_settings: StoreSettings) -> Storage:
    return Storage(store_settings)


@pytest.fixture
def ref(store_settings: StoreSettings) -> ObjectRef:
    return ObjectRef(store_settings.bucket, "models/스타일 1/a+b=100%.safetensors")


# --- A real store


def test_object_is_put_found_read_and_deleted(storage: Storage, ref: ObjectRef, tmp_path: Path) -> None:
    storage.put(ref, BODY, content_type="image/png", metadata={"task-id": "660f9511"})

    stat = storage.head(ref)
    assert stat == STAT
    assert storage.read(ref, max_bytes=len(BODY)) == BODY
    storage.download(ref, tmp_path / "file", stat=stat, max_bytes=len(BODY), deadline_seconds=5)
    assert (tmp_path / "file").read_bytes() == BODY

    storage.delete(ref)
    storage.delete(ref)
    with pytest.raises(ObjectNotFound):
        storage.read(ref, max_bytes=1)


def test_an_empty_object_is_an_object(storage: Storage, ref: ObjectRef) -> None:
    storage.put(ref, b"", content_type="text/plain")

    assert storage.head(ref).size_bytes == 0
    assert storage.read(ref, max_bytes=10) == b""


def test_missing_object_is_an_error_of_head_and_of_read(storage: Storage, ref: ObjectRef) -> None:
    with pytest.raises(ObjectNotFound, match="models"):
        storage.head(ref)
    with pytest.raises(ObjectNotFound, match="models"):
        storage.read(ref, max_bytes=1)


def test_missing_bucket_differs_from_a_missing_object(storage: Storage, store_settings: StoreSettings) -> None:
    with pytest.raises(BucketNotFound):
        storage.read(ObjectRef("no-such-bucket", "a"), max_bytes=1)
    with pytest.raises(BucketNotFound):
        storage.check_bucket("no-such-bucket")
    storage.check_bucket(store_settings.bucket)


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_denied_and_not_shown(store_settings: StoreSettings, name: str) -> None:
    secret = store_settings.secret_access_key
    assert secret is not None
    keys = {"AWS_ACCESS_KEY_ID": store_settings.access_key_id, "AWS_SECRET_ACCESS_KEY": secret.get_secret_value()}
    wrong = Storage(settings_of(str(store_settings.endpoint_url), **{**keys, name: SECRET}))

    for call in (wrong.head, lambda ref: wrong.read(ref, max_bytes=1), wrong.delete):
        with pytest.raises(AccessDenied) as raised:
            call(ObjectRef(store_settings.bucket, "a"))
        assert SECRET not in str(raised.value)


def test_object_replaced_after_head_is_not_read(storage: Storage, ref: ObjectRef, tmp_path: Path) -> None:
    storage.put(ref, b"before", content_type="text/plain")
    stat = storage.head(ref)
    storage.put(ref, b"after!", content_type="text/plain")

    with pytest.raises(ObjectChanged):
        storage.download(ref, tmp_path / "file", stat=stat, max_bytes=100, deadline_seconds=5)


def test_object_replaced_or_deleted_after_head_is_not_overwritten(storage: Storage, ref: ObjectRef) -> None:
    storage.put(ref, b"before", content_type="text/plain")
    before = storage.read_metadata(ref).etag
    storage.put(ref, b"after!", content_type="text/plain")
    after = storage.read_metadata(ref).etag

    assert not storage.put_if_unchanged(ref, b"late", etag=before, content_type="text/plain")
    assert storage.read(ref, max_bytes=10) == b"after!"
    assert storage.put_if_unchanged(ref, b"new", etag=after, content_type="text/plain")
    assert storage.read(ref, max_bytes=10) == b"new"

    storage.delete(ref)
    assert not storage.put_if_unchanged(ref, b"late", etag=after, content_type="text/plain")
    with pytest.raises(ObjectNotFound):
        storage.head(ref)


def test_too_large_an_object_is_refused(storage: Storage, ref: ObjectRef, tmp_path: Path) -> None:
    storage.put(ref, BODY, content_type="text/plain")

    with pytest.raises(ObjectTooLarge, match="10000 bytes, over the limit of 9999"):
        storage.read(ref, max_bytes=9_999)
    with pytest.raises(ObjectTooLarge):
        storage.download(ref, tmp_path / "file", stat=STAT, max_bytes=9_999, deadline_seconds=5)


def test_conditional_write_by_many_writers_succeeds_once(storage: Storage, ref: ObjectRef) -> None:
    def write(n: int) -> bool:
        return storage.put_if_absent(ref, b"%d" % n, content_type="application/json")

    with ThreadPoolExecutor(8) as pool:
        wins = list(pool.map(write, range(8)))

    assert wins.count(True) == 1
    assert storage.read(ref, max_bytes=10) == b"%d" % wins.index(True)


def test_the_url_of_an_object_names_it_again(storage: Storage, store_settings: StoreSettings, ref: ObjectRef) -> None:
    url = storage.public_url(ref)

    assert url.startswith(f"{store_settings.endpoint_url}/{ref.bucket}/models/%EC")
    assert url.endswith("/a%2Bb%3D100%25.safetensors")
    parsed = parse_location(
        url,
        default_bucket="media",
        allowed_buckets=store_settings.allowed_buckets,
        endpoint_url=store_settings.endpoint_url,
        region=store_settings.region,
    )
    assert parsed == ref


@pytest.mark.parametrize(
    ("bucket", "names", "url"),
    [
        ("media", {}, "https://media.s3.eu-west-1.amazonaws.com/gen%201.png"),
        ("my.media", {}, "https://s3.eu-west-1.amazonaws.com/my.media/gen%201.png"),
        ("media", {"RESULT_URL_BASE": "https://cdn.example/p/"}, "https://cdn.example/p/gen%201.png"),
    ],
)
def test_url_without_an_endpoint_has_the_base_or_aws(bucket: str, names: dict[str, str], url: str) -> None:
    settings = settings_of("", **{**names, "AWS_S3_ENDPOINT_URL": None, "AWS_S3_REGION_NAME": "eu-west-1"})

    assert Storage(settings).public_url(ObjectRef(bucket, "gen 1.png")) == url


# --- A store that misbehaves


def test_busy_store_is_retried() -> None:
    with AnsweringServer([SLOW_DOWN, WHOLE]) as server:
        assert storage_at(server).read(MISSING, max_bytes=len(BODY)) == BODY

    assert len(server.requests) == 2


def test_a_body_cut_short_is_fetched_again(tmp_path: Path) -> None:
    short = answer(200, BODY[:4000], length=len(BODY), ETag=ETAG, Connection="close")
    with AnsweringServer([short, WHOLE]) as server:
        storage_at(server).download(MISSING, tmp_path / "file", stat=STAT, max_bytes=len(BODY), deadline_seconds=5)

    assert (tmp_path / "file").read_bytes() == BODY
    assert [header(request, "If-Match") for request in server.requests] == [ETAG, ETAG]


MD5 = b64encode(bytes.fromhex(ETAG.strip('"'))).decode()
OPAQUE_ETAG = '"0123456789abcdef0123456789abcdef"'


@pytest.mark.parametrize(
    "damaged",
    [
        [answer(200, BODY[:4000], length=len(BODY), ETag=ETAG, Connection="close")],
        [answer(200, BODY[:-1] + byte, ETag=ETAG) for byte in (b"a", b"b", b"c")],
        [answer(200, BODY[:-1] + b"y", ETag=OPAQUE_ETAG, x_goog_hash=f"crc32c=AAAAAA==,md5={MD5}")],
        [answer(200, BODY[:-1] + b"y", ETag=OPAQUE_ETAG, Content_MD5=MD5)],
    ],
    ids=["cut short", "another byte each time", "not Google's hash", "not its Content-MD5"],
)
def test_body_that_stays_damaged_is_an_error_after_three_tries(damaged: list[bytes]) -> None:
    with AnsweringServer(damaged) as server, pytest.raises(ObjectDamaged):
        storage_at(server).read(MISSING, max_bytes=len(BODY))

    assert len(server.requests) == 3


def test_a_body_that_comes_twice_the_same_is_whole_and_its_etag_no_md5() -> None:
    with AnsweringServer([answer(200, BODY, ETag=OPAQUE_ETAG)]) as server:
        assert storage_at(server).read(MISSING, max_bytes=len(BODY)) == BODY

    assert len(server.requests) == 2


def test_a_weak_etag_is_compared_after_the_download_and_not_made_its_condition(tmp_path: Path) -> None:
    weak = answer(200, BODY, ETag=f"W/{ETAG}")
    with AnsweringServer([answer(200, length=len(BODY), ETag=f"W/{ETAG}"), weak]) as server:
        storage = storage_at(server)
        stat = storage.head(MISSING)
        storage.download(MISSING, tmp_path / "file", stat=stat, max_bytes=10**6, deadline_seconds=5)

    assert header(server.requests[1], "if-match") is None
    assert (tmp_path / "file").read_bytes() == BODY


def test_a_body_with_a_wrong_byte_is_not_taken_for_the_one_that_follows_it() -> None:
    wrong, whole = answer(200, BODY[:-1] + b"y", ETag=ETAG), answer(200, BODY, ETag=ETAG)
    with AnsweringServer([wrong, whole]) as server:
        assert storage_at(server).read(MISSING, max_bytes=len(BODY)) == BODY


@pytest.mark.parametrize(
    "whole",
    [
        answer(200, BODY, ETag='"0123456789abcdef0123456789abcdef-2"'),
        answer(200, BODY, ETag=OPAQUE_ETAG, x_amz_server_side_encryption="aws:kms"),
        answer(200, BODY, ETag=OPAQUE_ETAG, x_goog_hash=f"crc32c=AAAAAA==,md5={MD5}"),
        answer(200, BODY, ETag='"-CKicn4fknL0CEAE="', x_goog_hash="crc32c=AAAAAA=="),
    ],
    ids=["multipart", "kms", "google's with a hash", "google's composed of others"],
)
def test_an_etag_that_is_no_md5_is_not_taken_for_one(whole: bytes) -> None:
    with AnsweringServer([whole]) as server:
        assert storage_at(server).read(MISSING, max_bytes=len(BODY)) == BODY

    assert len(server.requests) == 1


def test_a_body_longer_than_allowed_is_not_read() -> None:
    with AnsweringServer([answer(200, BODY, length=10**12, ETag=ETAG)]) as server, pytest.raises(ObjectTooLarge):
        storage_at(server).read(MISSING, max_bytes=len(BODY))


def test_an_answer_without_a_size_is_refused() -> None:
    endless = b"HTTP/1.1 200 OK\r\nETag: " + ETAG.encode() + b"\r\nConnection: close\r\n\r\n" + BODY
    with AnsweringServer([endless]) as server, pytest.raises(StorageError, match="no size"):
        storage_at(server).read(MISSING, max_bytes=len(BODY))


@pytest.mark.parametrize(
    ("prompt", "drip"),
    [
        (b"HTTP/1.1 200 OK\r\nETag: %s\r\nContent-Length: 10000\r\n\r\n" % ETAG.encode(), b"x"),
        (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
        (b"", b"H"),
    ],
    ids=["body", "headers", "status line"],
)
def test_a_dripping_download_ends_at_its_deadline(tmp_path: Path, prompt: bytes, drip: bytes) -> None:
    with DrippingServer(prompt, drip) as server:
        storage, started = storage_at(server), time.monotonic()
        with pytest.raises(StorageUnavailable, match=r"not done within 0\.6 s"):
            storage.download(MISSING, tmp_path / "file", stat=STAT, max_bytes=10**6, deadline_seconds=0.6)

    assert time.monotonic() - started < 30
    assert server.num_connections == 1


def test_a_download_below_the_minimum_rate_ends_long_before_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients.storage.download, "RATE_WINDOW_SECONDS", 0.2)
    head = b"HTTP/1.1 200 OK\r\nETag: %s\r\nContent-Length: 10000\r\n\r\n" % ETAG.encode()
    with DrippingServer(head) as server:
        storage, started = storage_at(server), time.monotonic()
        with pytest.raises(StorageUnavailable, match="under 64000 bytes a second"):
            storage.download(MISSING, tmp_path / "file", stat=STAT, max_bytes=10**6, deadline_seconds=120)

    assert time.monotonic() - started < 60
    assert server.num_connections == 3


@pytest.mark.parametrize("server_class", [SilentServer, DrippingHandshakeServer])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_store_without_an_answer_ends_at_the_deadline(
    tmp_path: Path, server_class: type[Server], scheme: str
) -> None:
    with server_class() as server:
        storage, started = Storage(settings_of(server.url.replace("http", scheme))), time.monotonic()
        with pytest.raises(StorageUnavailable):
            storage.download(MISSING, tmp_path / "file", stat=STAT, max_bytes=10**6, deadline_seconds=0.6)

    assert time.monotonic() - started < 30


def test_a_stream_is_too_slow_when_one_window_has_too_few_bytes() -> None:
    moments: Iterator[float] = iter([0.0, 5.0, 10.0, 19.0, 20.0])
    pace = RateMonitor(clock=lambda: next(moments))
    enough = int(MIN_RATE_BYTES_PER_SECOND * RATE_WINDOW_SECONDS)

    assert not pace.is_too_slow(enough)
    assert not pace.is_too_slow(1)
    assert not pace.is_too_slow(enough - 2)
    assert pace.is_too_slow(1)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(status: int) -> None:
    with AnsweringServer([WHOLE]) as canary:
        redirect = answer(status, Location=f"{canary.url}/media/a", x_amz_bucket_region="eu-west-1")
        with AnsweringServer([redirect]) as server, pytest.raises(BucketNotFound):
            storage_at(server).read(MISSING, max_bytes=len(BODY))

    assert canary.num_connections == 0


def test_proxies_and_endpoints_of_the_environment_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    with AnsweringServer([answer(404)]) as canary, AnsweringServer([WHOLE]) as server:
        for name in ("HTTP_PROXY", "http_proxy", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.setenv(name, canary.url)
        assert storage_at(server).read(MISSING, max_bytes=len(BODY)) == BODY

    assert canary.num_connections == 0


def test_a_put_is_one_plain_request_with_its_sha256() -> None:
    with AnsweringServer([answer(200, ETag=ETAG)]) as server:
        storage_at(server).put(MISSING, BODY, content_type="image/png", metadata={"task-id": "7"})

    (request,) = server.requests
    assert request.startswith(b"PUT /media/models/missing.safetensors HTTP/1.1")
    assert header(request, "Content-Type") == "image/png"
    assert header(request, "x-amz-meta-task-id") == "7"
    assert header(request, "x-amz-checksum-sha256") == b64encode(hashlib.sha256(BODY).digest()).decode()
    assert header(request, "Transfer-Encoding") is None
    assert body_of(request) == BODY


PAGE = answer(200, b"<html><body>welcome</body></html>", Content_Type="text/html")
GONE = answer(404, b"<Error><Code>NoSuchKey</Code></Error>")


@pytest.mark.parametrize(
    ("held", "is_ours"),
    [(WHOLE, True), (answer(200, b"other", ETag=OPAQUE_ETAG), False)],
    ids=["what was to be written", "something else"],
)
def test_a_conditional_write_that_nothing_confirms_is_read_back(held: bytes, is_ours: bool) -> None:
    with AnsweringServer([PAGE, held]) as server:
        assert storage_at(server).put_if_absent(MISSING, BODY, content_type="text/plain") is is_ours

    assert [request.split(b" ", 1)[0] for request in server.requests][:2] == [b"PUT", b"GET"]


@pytest.mark.parametrize("held", [GONE, answer(200, b"other", ETag=OPAQUE_ETAG)], ids=["nothing", "something else"])
def test_write_that_failed_is_an_error_whatever_the_answer(held: bytes) -> None:
    with AnsweringServer([PAGE, held]) as server, pytest.raises(StorageUnavailable, match="not written"):
        storage_at(server).put(MISSING, BODY, content_type="text/plain")


def test_an_error_inside_a_good_answer_to_a_write_is_an_error() -> None:
    failed = answer(200, b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>InternalError</Code></Error>')
    written = answer(200, ETag=ETAG)
    with AnsweringServer([failed, written]) as server:
        assert storage_at(server).put_if_absent(MISSING, BODY, content_type="text/plain")

    assert len(server.requests) == 2


INTERIM = b"HTTP/1.1 102 Processing\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"


@pytest.mark.parametrize("interim", INTERIM, ids=["102", "103"])
@pytest.mark.parametrize(
    ("final", "is_written"),
    [(answer(200, ETag=ETAG), True), (answer(412, b"<Error><Code>PreconditionFailed</Code></Error>"), False)],
    ids=["written", "taken"],
)
def test_an_interim_answer_does_not_decide_what_a_conditional_write_did(
    interim: bytes,
    final: bytes,
    is_written: bool,
) -> None:
    with AnsweringServer([interim + final, answer(404)]) as server:
        storage = storage_at(server)
        assert storage.put_if_absent(MISSING, BODY, content_type="text/plain") is is_written

        # Nor is what follows on the connection an answer to the next request.
        with pytest.raises(ObjectNotFound):
            storage.head(MISSING)
    assert len(server.requests) == 2


def test_write_to_a_missing_bucket_is_that_error_whatever_the_code() -> None:
    with AnsweringServer([GONE]) as server, pytest.raises(BucketNotFound):
        storage_at(server).put(MISSING, BODY, content_type="text/plain")


@pytest.mark.parametrize("call", ["read", "head", "put"])
def test_a_page_with_a_good_status_is_no_answer_of_a_store(call: str) -> None:
    calls = {
        "read": lambda storage: storage.read(MISSING, max_bytes=1000),
        "head": lambda storage: storage.head(MISSING),
        "put": lambda storage: storage.put(MISSING, BODY, content_type="text/plain"),
    }
    # A job that meets it waits; it does not fail after four tries, and all jobs behind it.
    with AnsweringServer([PAGE]) as server, pytest.raises(NotAStore, match="AWS_S3_ENDPOINT_URL"):
        calls[call](storage_at(server))


def test_a_page_of_another_server_is_no_answer_of_a_store() -> None:
    with pytest.raises(NotAStore, match="AWS_S3_ENDPOINT_URL"), translate_errors(MISSING):
        raise ResponseParserError("Unable to parse response")


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), NotAStore),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), StorageUnavailable),
        (ssl.SSLCertVerificationError("self-signed certificate"), NotAStore),
        (ssl.SSLEOFError("EOF occurred"), StorageUnavailable),
    ],
    ids=["no such host", "name server busy", "wrong certificate", "cut handshake"],
)
def test_permanent_errors_differ_from_temporary_ones(cause: Exception, expected: type[StorageError]) -> None:
    with pytest.raises(StorageError) as raised, translate_errors(MISSING):
        try:
            raise cause
        except OSError as error:
            raise boto.EndpointConnectionError(endpoint_url="https://s3.example", error=error) from error

    assert type(raised.value) is expected


def test_a_conflict_of_conditional_writes_is_tried_again() -> None:
    conflict = answer(409, b"<Error><Code>ConditionalRequestConflict</Code></Error>")
    with AnsweringServer([conflict, conflict, answer(200, ETag=ETAG)]) as server:
        assert storage_at(server).put_if_absent(MISSING, b"{}", content_type="application/json")
    assert [header(request, "If-None-Match") for request in server.requests] == ["*"] * 3

    with AnsweringServer([conflict]) as server, pytest.raises(WriteConflict):
        storage_at(server).put_if_absent(MISSING, b"{}", content_type="application/json")


def test_store_that_resets_is_unavailable_and_its_address_not_shown(tmp_path: Path) -> None:
    with ResettingServer() as server, pytest.raises(StorageUnavailable) as raised:
        storage_at(server).download(MISSING, tmp_path / "file", stat=STAT, max_bytes=10**6, deadline_seconds=1)

    assert SECRET not in str(raised.value)
    assert "127.0.0.1" not in str(raised.value)


def test_a_store_that_refuses_connections_is_unavailable(tmp_path: Path) -> None:
    storage = Storage(settings_of(refused_url()))

    with pytest.raises(StorageUnavailable):
        storage.download(MISSING, tmp_path / "file", stat=STAT, max_bytes=10**6, deadline_seconds=1)


# --- Errors


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (404, "NoSuchKey", ObjectNotFound),
        (404, "404", ObjectNotFound),
        (404, "NoSuchBucket", BucketNotFound),
        (301, "PermanentRedirect", BucketNotFound),
        (401, "401", AccessDenied),
        (403, "403", AccessDenied),
        (403, "InvalidAccessKeyId", AccessDenied),
        (403, "SignatureDoesNotMatch", AccessDenied),
        (403, "RequestTimeTooSkewed", AccessDenied),
        (400, "ExpiredToken", AccessDenied),
        (400, "AuthorizationHeaderMalformed", AccessDenied),
        (400, "IllegalLocationConstraintException", BucketNotFound),
        (400, "InvalidBucketName", BucketNotFound),
        (307, "TemporaryRedirect", BucketNotFound),
        (403, "AccountProblem", AccessDenied),
        (403, "AllAccessDisabled", AccessDenied),
        (403, "QuotaExceeded", AccessDenied),
        (405, "MethodNotAllowed", NotAStore),
        (400, "BadDigest", StorageUnavailable),
        (400, "IncompleteBody", StorageUnavailable),
        (507, "XMinioStorageFull", StorageUnavailable),
        (400, "RequestTimeout", StorageUnavailable),
        (429, "TooManyRequests", StorageUnavailable),
        (500, "InternalError", StorageUnavailable),
        (503, "SlowDown", StorageUnavailable),
        (409, "ConditionalRequestConflict", WriteConflict),
        (412, "PreconditionFailed", ObjectChanged),
        (400, "InvalidRequest", StorageError),
        (501, "NotImplemented", NotSupported),
    ],
)
def test_every_answer_has_its_error(status: int, code: str, expected: type[StorageError]) -> None:
    response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}

    with pytest.raises(StorageError) as raised, translate_errors(MISSING):
        raise boto.ClientError(response, "GetObject")  # type: ignore[arg-type]

    assert type(raised.value) is expected
    assert str(raised.value).startswith(f"{MISSING}: the store answered {status}")


def descendants(base: type[Exception]) -> list[type[Exception]]:
    return [base, *(found for child in base.__subclasses__() for found in descendants(child))]


@pytest.mark.parametrize(
    "kind",
    [*descendants(boto.BotoCoreError), *descendants(urllib3.exceptions.HTTPError), DeadlineExpired],
    ids=lambda kind: kind.__name__,
)
def test_no_error_of_a_library_gets_through(kind: type[Exception]) -> None:
    with pytest.raises(StorageError), translate_errors(MISSING):
        raise kind.__new__(kind)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (boto.NoCredentialsError, AccessDenied),
        (boto.EndpointConnectionError, StorageUnavailable),
        (boto.ReadTimeoutError, StorageUnavailable),
        (boto.ConnectionClosedError, StorageUnavailable),
        (boto.SSLError, StorageUnavailable),
        (urllib3.exceptions.ReadTimeoutError, StorageUnavailable),
        (boto.ParamValidationError, StorageError),
    ],
)
def test_connection_errors_are_unavailable(kind: type[Exception], expected: type[StorageError]) -> None:
    with pytest.raises(StorageError) as raised, translate_errors(MISSING):
        raise kind.__new__(kind)

    assert type(raised.value) is expected
