"""Objects in S3 or a store that speaks it: look, read, download, write. The only file that calls boto3's client."""

import hashlib
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from botocore.exceptions import ClientError

from clients.deadline import Watch, deadline
from clients.storage.errors import (
    BucketNotFound,
    NotAStore,
    ObjectChanged,
    ObjectDamaged,
    ObjectNotFound,
    ObjectTooLarge,
    StorageUnavailable,
    WriteConflict,
    translated,
)
from clients.storage.location import ObjectRef, aws_url
from clients.storage.transport import WEAK, Content, DigestCheck, etag_of, put_object, s3_client
from config.logs import log_event
from config.store import StoreSettings

# All of a call but a download: four attempts, their pauses, and a few megabytes over a slow line.
CALL_DEADLINE_SECONDS = 60.0
# boto3 does not retry a body that breaks off; half a second lets a restarting proxy come back.
MAX_DOWNLOAD_TRIES = 3
RETRY_PAUSE_SECONDS = 0.5
MAX_WRITE_TRIES = 4
# The most that S3 gives of a listing in one answer.
PAGE_KEYS = 1000
CHUNK_BYTES = 1 << 18
# Slower than this, a download holds a job's place without hope of ending in useful time.
MIN_RATE_BYTES_PER_SECOND = 64_000
RATE_WINDOW_SECONDS = 10.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ObjectStat:
    """What the store says of an object: its ETag without quotes, and its size."""

    etag: str
    size_bytes: int


@dataclass(frozen=True)
class ObjectNotes:
    """An object as its writer left it: its ETag exactly as the store gives it, for `put_if_unchanged`, and what was
    noted beside it."""

    etag: str
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class ListedObject:
    """An object of a listing: what it is called and when it was last written."""

    key: str
    modified_at: datetime


class Pace:
    """Judges whether a stream keeps the minimum rate, window by window."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._window_start = clock()
        self._window_bytes = 0

    def is_too_slow(self, num_bytes: int) -> bool:
        """Count `num_bytes` that just arrived; True at the end of a window that had too few."""
        self._window_bytes += num_bytes
        elapsed = self._clock() - self._window_start
        if elapsed < RATE_WINDOW_SECONDS:
            return False
        rate = self._window_bytes / elapsed
        self._window_start += elapsed
        self._window_bytes = 0
        return rate < MIN_RATE_BYTES_PER_SECOND


class Storage:
    """Owns the S3 client; thread-safe. Every method raises only `StorageError`s, and ends by its deadline."""

    def __init__(self, settings: StoreSettings) -> None:
        self._settings = settings
        self._client = s3_client(settings)

    def check_bucket(self, bucket: str) -> None:
        """Raise `BucketNotFound`, `AccessDenied` or `StorageUnavailable` where `bucket` cannot be used."""
        subject = f"s3://{bucket}"
        try:
            with deadline(CALL_DEADLINE_SECONDS), translated(subject):
                self._client.head_bucket(Bucket=bucket)
        except ObjectNotFound as error:
            # A HEAD has no error code, so a missing bucket reads like a missing object.
            raise BucketNotFound(f"{subject}: no such bucket") from error

    def seconds_ahead(self, bucket: str) -> float | None:
        """How far this machine's clock is ahead of the store's, to a second; None where the store tells no time."""
        with deadline(CALL_DEADLINE_SECONDS), translated(f"s3://{bucket}"):
            try:
                answer = self._client.head_bucket(Bucket=bucket)
            except ClientError as refusal:
                # It has the time too, and to a wrong clock a refusal is all there is.
                answer = refusal.response
        date = answer["ResponseMetadata"].get("HTTPHeaders", {}).get("date")
        return None if date is None else time.time() - parsedate_to_datetime(date).timestamp()

    def each_below(self, bucket: str, prefix: str, *, page_keys: int = PAGE_KEYS) -> Iterator[ListedObject]:
        """Every object whose key begins with `prefix`, in the order of the keys: S3 knows no other."""
        asked: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": page_keys}
        while True:
            with deadline(CALL_DEADLINE_SECONDS), translated(f"s3://{bucket}/{prefix}"):
                page = self._client.list_objects_v2(**asked)
            yield from (ListedObject(entry["Key"], entry["LastModified"]) for entry in page.get("Contents", ()))
            if "NextContinuationToken" not in page:
                return
            asked["ContinuationToken"] = page["NextContinuationToken"]

    def head(self, ref: ObjectRef) -> ObjectStat:
        """ETag and size of the object; `ObjectNotFound` also where the bucket is missing: see `check_bucket`."""
        with deadline(CALL_DEADLINE_SECONDS), translated(ref):
            return _stat_of(ref, self._client.head_object(Bucket=ref.bucket, Key=ref.key))

    def read(self, ref: ObjectRef, *, max_bytes: int) -> bytes:
        """The whole object in memory; for small ones."""
        sink = BytesIO()
        self._fetch(ref, sink, stat=None, max_bytes=max_bytes, seconds=CALL_DEADLINE_SECONDS)
        return sink.getvalue()

    def download(
        self, ref: ObjectRef, target: Path, *, stat: ObjectStat, max_bytes: int, deadline_seconds: float
    ) -> None:
        """Write the object that `stat` describes to `target`, in up to three tries within `deadline_seconds`.

        `ObjectChanged` where it is another object by now. After an error `target` may hold a part: delete it. An
        `OSError` is the disk's.
        """
        with target.open("wb") as sink:
            self._fetch(ref, sink, stat=stat, max_bytes=max_bytes, seconds=deadline_seconds)

    def put(
        self,
        ref: ObjectRef,
        body: bytes,
        *,
        content_type: str,
        metadata: Mapping[str, str] | None = None,
        cache_control: str | None = None,
        deadline_seconds: float = CALL_DEADLINE_SECONDS,
    ) -> None:
        """Write the object whole, in one request with its SHA-256. `metadata` is ASCII; `cache_control` is what its
        readers are told by that header."""
        content = Content(body, content_type, metadata or {}, cache_control)
        with deadline(deadline_seconds):
            is_certain = self._put(ref, content)
        if not is_certain and not self._holds(ref, body):
            raise StorageUnavailable(f"{ref}: not written, though the store said nothing against it")

    def notes_of(self, ref: ObjectRef) -> ObjectNotes:
        """The object's ETag, and what its writer noted beside it."""
        with deadline(CALL_DEADLINE_SECONDS), translated(ref):
            answer = self._client.head_object(Bucket=ref.bucket, Key=ref.key)
        return ObjectNotes(str(answer.get("ETag", "")), dict(answer.get("Metadata", {})))

    def put_if_absent(
        self,
        ref: ObjectRef,
        body: bytes,
        *,
        content_type: str,
        metadata: Mapping[str, str] | None = None,
        cache_control: str | None = None,
    ) -> bool:
        """Write the object unless the key is taken; False where it is.

        False may also mean that the answer to our own write was lost and the repeated request met it: compare what is
        there with what was to be written.
        """
        return self._put_if({"IfNoneMatch": "*"}, ref, Content(body, content_type, metadata or {}, cache_control))

    def put_if_unchanged(
        self,
        ref: ObjectRef,
        body: bytes,
        *,
        etag: str,
        content_type: str,
        metadata: Mapping[str, str] | None = None,
        cache_control: str | None = None,
    ) -> bool:
        """Overwrite the object that has this ETag; False where another one is there by now, or none.

        The condition holds when the store commits the write, however long the request took. False may also mean that
        the answer to our own write was lost, as with `put_if_absent`.
        """
        content = Content(body, content_type, metadata or {}, cache_control)
        try:
            return self._put_if({"IfMatch": etag}, ref, content)
        except ObjectNotFound:
            return False  # S3's answer where the object has been deleted

    def _put_if(self, condition: Mapping[str, str], ref: ObjectRef, content: Content) -> bool:
        for attempt in range(1, MAX_WRITE_TRIES + 1):
            try:
                with deadline(CALL_DEADLINE_SECONDS):
                    is_certain = self._put(ref, content, **condition)
                return is_certain or self._holds(ref, content.body)
            except ObjectChanged:
                return False
            except WriteConflict:
                if attempt == MAX_WRITE_TRIES:
                    raise
                time.sleep(random.uniform(0.05, 0.2) * attempt)  # noqa: S311 - jitter
        raise AssertionError("the last try returns or raises")

    def delete(self, ref: ObjectRef) -> None:
        """Remove the object; none there is no error."""
        # S3 answers 204 where there is none, Google 404.
        with deadline(CALL_DEADLINE_SECONDS), suppress(ObjectNotFound), translated(ref):
            self._client.delete_object(Bucket=ref.bucket, Key=ref.key)

    def url_of(self, ref: ObjectRef) -> str:
        """The address readers use: under `RESULT_URL_BASE`, or the endpoint's or AWS's https form."""
        key = quote(ref.key)
        if self._settings.result_url_base is not None:
            return f"{self._settings.result_url_base}/{key}"
        if self._settings.endpoint_url is not None:
            return f"{self._settings.endpoint_url}/{ref.bucket}/{key}"
        return aws_url(ref.bucket, key, self._settings.region)

    def _put(self, ref: ObjectRef, content: Content, **condition: str) -> bool:
        """Send the object. False where the answer is no refusal, and no store's word for a write either."""
        try:
            with translated(ref):
                return put_object(self._client, ref, content, **condition)
        except ObjectNotFound as error:
            if "IfMatch" in condition:
                raise
            # Such a write looks for no object: what is missing is the bucket.
            raise BucketNotFound(str(error)) from error

    def _holds(self, ref: ObjectRef, body: bytes) -> bool:
        """Whether `body` is what the store has under the key; raises `StorageUnavailable` where it has nothing."""
        log_event(logger, "write read back", logging.WARNING, key=ref.key)
        try:
            return self.read(ref, max_bytes=len(body)) == body
        except ObjectTooLarge:
            return False
        except ObjectNotFound as error:
            raise StorageUnavailable(f"{ref}: not written, though the store said nothing against it") from error

    def _fetch(
        self, ref: ObjectRef, sink: BinaryIO, *, stat: ObjectStat | None, max_bytes: int, seconds: float
    ) -> None:
        if stat is not None:
            check_size(ref, stat, max_bytes)
        check = DigestCheck(ref)
        with deadline(seconds) as watch:
            for attempt in range(1, MAX_DOWNLOAD_TRIES + 1):
                try:
                    answer, md5 = self._fetch_once(ref, sink, stat, max_bytes, watch)
                    check.refuse_damage(answer, md5)
                except (ObjectDamaged, StorageUnavailable) as error:
                    if isinstance(error, ObjectChanged) or watch.is_expired or attempt == MAX_DOWNLOAD_TRIES:
                        raise
                    time.sleep(RETRY_PAUSE_SECONDS)
                else:
                    return

    def _fetch_once(
        self, ref: ObjectRef, sink: BinaryIO, stat: ObjectStat | None, max_bytes: int, watch: Watch
    ) -> tuple[Mapping[str, Any], str]:
        """The answer, and the MD5 of its body in hex."""
        condition = {} if stat is None or stat.etag.startswith(WEAK) else {"IfMatch": f'"{stat.etag}"'}
        sink.seek(0)
        sink.truncate()
        with translated(ref):
            answer = self._client.get_object(Bucket=ref.bucket, Key=ref.key, **condition)
            with answer["Body"] as raw:
                found = _stat_of(ref, answer)
                if stat is not None and found != stat:
                    raise ObjectChanged(f"{ref}: not the object that was there before")
                check_size(ref, found, max_bytes)
                return answer, _copy(ref, raw, sink, found.size_bytes, watch)


def _copy(ref: ObjectRef, raw: Any, sink: BinaryIO, size_bytes: int, watch: Watch) -> str:
    """Copy exactly `size_bytes` from `raw` to `sink`; returns their MD5 in hex."""
    digest = hashlib.md5(usedforsecurity=False)
    pace = Pace()
    num_bytes = 0
    # read1 gives what has arrived; read would wait for a full chunk, which a drip never makes.
    while chunk := raw.read1(CHUNK_BYTES):
        num_bytes += len(chunk)
        if num_bytes > size_bytes:
            break
        digest.update(chunk)
        sink.write(chunk)
        if pace.is_too_slow(len(chunk)):
            raise StorageUnavailable(f"{ref}: arrives at under {MIN_RATE_BYTES_PER_SECOND} bytes a second")
    if num_bytes != size_bytes:
        watch.refuse_if_expired()
        raise ObjectDamaged(f"{ref}: {num_bytes} bytes arrived of {size_bytes}")
    return digest.hexdigest()


def _stat_of(ref: ObjectRef, answer: Mapping[str, Any]) -> ObjectStat:
    size_bytes = answer.get("ContentLength")
    if "ETag" not in answer or size_bytes is None:
        raise NotAStore(f"{ref}: the answer has no ETag or no size, as no store's: look at AWS_S3_ENDPOINT_URL")
    return ObjectStat(etag_of(answer), int(size_bytes))


def check_size(ref: ObjectRef, stat: ObjectStat, max_bytes: int) -> None:
    """Raise `ObjectTooLarge` where the object has more than `max_bytes`."""
    if stat.size_bytes > max_bytes:
        raise ObjectTooLarge(f"{ref}: {stat.size_bytes} bytes, over the limit of {max_bytes}")
