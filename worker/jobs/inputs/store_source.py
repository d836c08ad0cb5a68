"""Objects of the store as a job's inputs, read through the cache."""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from threading import Event
from typing import TypeVar

from clients.storage.cache import DownloadCache
from clients.storage.client import Storage
from clients.storage.errors import AccessDenied, BucketNotFound, ObjectNotFound, StoreRefused
from clients.storage.key_variants import key_variants
from clients.storage.location import ObjectRef
from worker.breakers import StoreGate
from worker.errors import ErrorCode, JobFailed
from worker.jobs.inputs.slow_fetches import SlowFetchLimit
from worker.jobs.inputs.source import FetchedFile

FETCH_DEADLINE_SECONDS = 300.0
# Before an object that is not there is believed not to be.
NOT_FOUND_RETRY_SECONDS = 2.0

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class StoreSource:
    """`ObjectSource` of the store: waits for the worker's own buckets and rights, and for uploads still in progress."""

    storage: Storage
    cache: DownloadCache
    private_bucket: str
    is_draining: Event
    gate: StoreGate
    results_bucket: str = ""  # where it is another one than the private bucket
    places: SlowFetchLimit = field(default_factory=SlowFetchLimit)

    def read(self, ref: ObjectRef, max_bytes: int) -> bytes:
        """Return the object's content; blocks."""

        def read(ref: ObjectRef) -> bytes:
            with self.cache.fetch(ref, max_bytes=max_bytes, deadline_seconds=FETCH_DEADLINE_SECONDS) as path:
                return path.read_bytes()

        return self._retry_once(ref, read)

    def fetch(self, ref: ObjectRef, max_bytes: int, pinned: ExitStack) -> FetchedFile:
        """Fetch the object into the cache, where it stays until `pinned` closes; blocks."""
        path = self._retry_once(
            ref,
            lambda ref: pinned.enter_context(
                self.cache.fetch(ref, max_bytes=max_bytes, deadline_seconds=FETCH_DEADLINE_SECONDS)
            ),
        )
        # The cache names a file for the version of its object: key, ETag and size.
        return FetchedFile(path, version=path.name)

    def exists(self, ref: ObjectRef) -> bool:
        """Return whether the object is there and may be read."""
        try:
            self.storage.head(ref)
        except (ObjectNotFound, AccessDenied):
            # Without the right to list a bucket, AWS denies what does not exist.
            return False
        return True

    def _retry_once(self, ref: ObjectRef, fetch: Callable[[ObjectRef], Made]) -> Made:
        """Fetch, retrying once: a 404 may be an upload still in progress, and a refusal may concern this object or the
        worker itself, which waits for its own buckets and its rights."""
        try:
            with self.places.waiting_for(ref):
                return _try_key_variants(ref, fetch)
        except ObjectNotFound:
            self.is_draining.wait(NOT_FOUND_RETRY_SECONDS)
            self.gate.retry_while_denied(lambda: self._check_exists(ref.bucket))
        except StoreRefused:
            self.gate.retry_while_denied(lambda: self.storage.check_bucket(self.private_bucket))
            self.gate.retry_while_denied(lambda: self._check_exists(ref.bucket))
        try:
            with self.places.waiting_for(ref):
                return _try_key_variants(ref, fetch)
        except AccessDenied as error:
            raise JobFailed(ErrorCode.INPUT_FORBIDDEN, f"the store does not let this worker read {ref}") from error
        except BucketNotFound as error:
            if ref.bucket in (self.private_bucket, self.results_bucket):
                raise
            raise ObjectNotFound(str(error)) from error

    def _check_exists(self, bucket: str) -> None:
        """Raise `BucketNotFound` where one of the worker's own buckets is missing. Another one is its job's affair."""
        if bucket in (self.private_bucket, self.results_bucket):
            # A key may read objects without the right to look at their bucket.
            with suppress(AccessDenied):
                self.storage.check_bucket(bucket)


def _try_key_variants(ref: ObjectRef, fetch: Callable[[ObjectRef], Made]) -> Made:
    """Fetch `ref` as it is named, else by another spelling of its key."""
    first, *others = key_variants(ref)
    try:
        return fetch(first)
    except ObjectNotFound:
        for other in others:
            with suppress(ObjectNotFound):
                return fetch(other)
        raise
