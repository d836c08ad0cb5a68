"""Client of S3 or a compatible store: list, head, read, download, write, delete."""

import logging
import random
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

from botocore.exceptions import ClientError, NoCredentialsError

from clients.deadline import deadline
from clients.storage.download import download_object
from clients.storage.errors import (
    BucketNotFound,
    ObjectChanged,
    ObjectNotFound,
    ObjectTooLarge,
    StorageUnavailable,
    WriteConflict,
    translate_errors,
)
from clients.storage.google import LOCATION
from clients.storage.location import ObjectRef
from clients.storage.objects import ListedObject, ObjectMetadata, ObjectStat, stat_of
from clients.storage.presigning import GOOGLE, SigningKey, presigned_url
from clients.storage.transport import s3_client
from clients.storage.upload import ObjectContent, put_object
from config.logs import log_event
from config.store import StoreSettings

# All of a call but a download: four attempts, their pauses, and a few megabytes over a slow line.
CALL_DEADLINE_SECONDS = 60.0
MAX_WRITE_TRIES = 4
# The most keys that S3 returns in one page of a listing.
PAGE_KEYS = 1000
_HOST_LABEL = re.compile(r"[a-z0-9-]{1,63}")

logger = logging.getLogger(__name__)


class Storage:
    """Owner of the S3 client; thread-safe. Every method raises only `StorageError`s, and ends by its deadline."""

    def __init__(self, settings: StoreSettings) -> None:
        self._settings = settings
        self._client, self._credentials, self._google = s3_client(settings)

    def check_bucket(self, bucket: str) -> None:
        """Raise `BucketNotFound`, `AccessDenied` or `StorageUnavailable` where `bucket` cannot be used."""
        subject = f"s3://{bucket}"
        try:
            with deadline(CALL_DEADLINE_SECONDS), translate_errors(subject):
                self._client.head_bucket(Bucket=bucket)
        except ObjectNotFound as error:
            # A HEAD has no error code, so a missing bucket reads like a missing object.
            raise BucketNotFound(f"{subject}: no such bucket") from error

    def clock_skew_seconds(self, bucket: str) -> float | None:
        """Return how far the local clock is ahead of the store's, to a second; None without a `Date` header."""
        with deadline(CALL_DEADLINE_SECONDS), translate_errors(f"s3://{bucket}"):
            try:
                response = self._client.head_bucket(Bucket=bucket)
            except ClientError as refusal:
                # It has a `Date` too, and a clock that is wrong gets refusals only.
                response = refusal.response
        date = response["ResponseMetadata"].get("HTTPHeaders", {}).get("date")
        return None if date is None else time.time() - parsedate_to_datetime(date).timestamp()

    def list_objects(self, bucket: str, prefix: str, *, page_keys: int = PAGE_KEYS) -> Iterator[ListedObject]:
        """Yield every object whose key begins with `prefix`, in the order of the keys: S3 has no other."""
        query: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": page_keys}
        while True:
            with deadline(CALL_DEADLINE_SECONDS), translate_errors(f"s3://{bucket}/{prefix}"):
                page = self._client.list_objects_v2(**query)
            yield from (ListedObject(entry["Key"], entry["LastModified"]) for entry in page.get("Contents", ()))
            if "NextContinuationToken" not in page:
                return
            query["ContinuationToken"] = page["NextContinuationToken"]

    def head(self, ref: ObjectRef) -> ObjectStat:
        """Return ETag and size; `ObjectNotFound` also where the bucket is missing: see `check_bucket`."""
        with deadline(CALL_DEADLINE_SECONDS), translate_errors(ref):
            return stat_of(ref, self._client.head_object(Bucket=ref.bucket, Key=ref.key))

    def read_metadata(self, ref: ObjectRef) -> ObjectMetadata:
        """Return the object's ETag and user metadata."""
        with deadline(CALL_DEADLINE_SECONDS), translate_errors(ref):
            response = self._client.head_object(Bucket=ref.bucket, Key=ref.key)
        return ObjectMetadata(str(response.get("ETag", "")), dict(response.get("Metadata", {})))

    def read(self, ref: ObjectRef, *, max_bytes: int) -> bytes:
        """Return the whole object in memory; for small ones."""
        sink = BytesIO()
        download_object(self._client, ref, sink, stat=None, max_bytes=max_bytes, deadline_seconds=CALL_DEADLINE_SECONDS)
        return sink.getvalue()

    def download(
        self, ref: ObjectRef, target: Path, *, stat: ObjectStat, max_bytes: int, deadline_seconds: float
    ) -> None:
        """Write the object that `stat` describes to `target`, in up to three tries within `deadline_seconds`.

        Raises `ObjectChanged` where it is another object by now. After an error `target` may hold a part: delete it.
        An `OSError` comes from the disk.
        """
        with target.open("wb") as sink:
            download_object(self._client, ref, sink, stat=stat, max_bytes=max_bytes, deadline_seconds=deadline_seconds)

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
        """Write the object whole, in one request with its SHA-256. See `ObjectContent`."""
        content = ObjectContent(body, content_type, metadata or {}, cache_control)
        with deadline(deadline_seconds):
            is_confirmed = put_object(self._client, ref, content)
        if not is_confirmed and not self._holds(ref, body):
            raise StorageUnavailable(f"{ref}: not written, though the store said nothing against it")

    def put_if_absent(
        self,
        ref: ObjectRef,
        body: bytes,
        *,
        content_type: str,
        metadata: Mapping[str, str] | None = None,
        cache_control: str | None = None,
    ) -> bool:
        """Write the object unless the key is taken; return False where it is.

        False may also mean that the response to our own write was lost and the repeated request met it: compare what
        is there with what was to be written.
        """
        return self._put_if({"IfNoneMatch": "*"}, ref, ObjectContent(body, content_type, metadata or {}, cache_control))

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
        """Overwrite the object that has this ETag; return False where another one is there by now, or none.

        The condition holds when the store commits the write, however long the request took. False may also mean that
        the response to our own write was lost, as with `put_if_absent`.
        """
        content = ObjectContent(body, content_type, metadata or {}, cache_control)
        try:
            return self._put_if({"IfMatch": etag}, ref, content)
        except ObjectNotFound:
            return False  # S3's answer where the object has been deleted

    def _put_if(self, condition: Mapping[str, str], ref: ObjectRef, content: ObjectContent) -> bool:
        for attempt in range(1, MAX_WRITE_TRIES + 1):
            try:
                with deadline(CALL_DEADLINE_SECONDS):
                    is_confirmed = put_object(self._client, ref, content, **condition)
                return is_confirmed or self._holds(ref, content.body)
            except ObjectChanged:
                return False
            except WriteConflict:
                if attempt == MAX_WRITE_TRIES:
                    raise
                time.sleep(random.uniform(0.05, 0.2) * attempt)  # noqa: S311 - jitter
        raise AssertionError("the last try returns or raises")

    def delete(self, ref: ObjectRef) -> None:
        """Remove the object; a missing one is no error."""
        # S3 answers 204 where there is none, Google 404.
        with deadline(CALL_DEADLINE_SECONDS), suppress(ObjectNotFound), translate_errors(ref):
            self._client.delete_object(Bucket=ref.bucket, Key=ref.key)

    def public_url(self, ref: ObjectRef) -> str:
        """Return the plain URL: under `RESULT_URL_BASE`, or the endpoint's or AWS's https form."""
        key = quote(ref.key)
        if self._settings.result_url_base is not None:
            return f"{self._settings.result_url_base}/{key}"
        if self._settings.endpoint_url is not None:
            return f"{self._settings.endpoint_url}/{ref.bucket}/{key}"
        host = f"s3.{self._settings.region}.amazonaws.com"
        # AWS's certificate covers one label before `s3`: other bucket names go into the path.
        is_label = _HOST_LABEL.fullmatch(ref.bucket) is not None
        return f"https://{ref.bucket}.{host}/{key}" if is_label else f"https://{host}/{ref.bucket}/{key}"

    @property
    def is_presigning(self) -> bool:
        """Whether `result_url` is another one at every call."""
        return self._settings.presigned_seconds is not None

    def result_url(self, ref: ObjectRef, *, at: float | None = None) -> str:
        """Return the URL for readers, as `RESULT_URL_MODE` says: the plain one, or the plain one presigned now.

        A presigned one is a secret while it is valid. `at` is Unix time in place of now. Raises `StorageError` where
        there are no credentials to sign with.
        """
        url, seconds = self.public_url(ref), self._settings.presigned_seconds
        if seconds is None:
            return url
        with translate_errors(ref):
            key = self._signing_key()
        at = time.time() if at is None else at
        if self._google is not None and self._google.is_google:
            return presigned_url(url, key, seconds=seconds, at=at, region=LOCATION, names=GOOGLE)
        return presigned_url(url, key, seconds=seconds, at=at, region=self._settings.region)

    def _signing_key(self) -> SigningKey:
        """Return the current access key, which of a role changes every few hours."""
        if self._credentials is None:
            raise NoCredentialsError
        return SigningKey(*self._credentials.get_frozen_credentials()[:3])

    def _holds(self, ref: ObjectRef, body: bytes) -> bool:
        """Return whether the store has `body` under the key; raise `StorageUnavailable` where it has nothing."""
        log_event(logger, "write read back", logging.WARNING, key=ref.key)
        try:
            return self.read(ref, max_bytes=len(body)) == body
        except ObjectTooLarge:
            return False
        except ObjectNotFound as error:
            raise StorageUnavailable(f"{ref}: not written, though the store said nothing against it") from error
