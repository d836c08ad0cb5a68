"""Check the store: its answer, its clock, both buckets with every kind of call, conditional writes."""

import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

from clients.storage.client import Storage
from clients.storage.errors import AccessDenied, BucketNotFound, NotSupported, StorageError
from clients.storage.location import ObjectRef
from config.store import StoreSettings
from worker.cli.check.checks import CheckFailed

# Stores refuse a clock that is wrong by 900 seconds; receivers of signed webhooks one that is by 300.
MAX_SKEW_SECONDS = 300.0
MAX_PROBE_BYTES = 16
# Where the ledger tries conditional writes too.
PROBE_FOLDER = ".darkroom/"
CONTENT_TYPE = "application/json"


@dataclass(frozen=True)
class StoreProbe:
    """Checks of the store. What is written is removed. Each returns what was seen or raises `CheckFailed`."""

    settings: StoreSettings

    def answer(self) -> str:
        """Check that the store answers, and compare its clock with ours."""
        try:
            ahead = self._storage.clock_skew_seconds(self.settings.bucket)
        except StorageError as error:
            raise CheckFailed(f"{error}: is {self._place} running? look at AWS_S3_ENDPOINT_URL") from error
        if ahead is None:
            return f"{self._place} answers, and tells no time"
        if abs(ahead) > MAX_SKEW_SECONDS:
            way = "ahead of" if ahead > 0 else "behind"
            refused = "requests end as RequestTimeTooSkewed and signed webhooks are refused"
            raise CheckFailed(f"this clock is {abs(ahead):.0f} s {way} the store's, {refused}: set it, best by NTP")
        return f"{self._place} answers; the clocks agree within {max(1.0, abs(ahead)):.0f} s"

    def bucket(self) -> str:
        """List, write, read and clean the private bucket."""
        return self._try(self.settings.bucket, "jobs/", "AWS_STORAGE_BUCKET_NAME")

    def results_bucket(self) -> str:
        """List, write, read and clean the bucket of the results."""
        return self._try(self.settings.results_bucket, "generations/", "AWS_RESULTS_BUCKET_NAME")

    def conditional_writes(self) -> str:
        """Check that If-None-Match prevents an overwrite. The ledger depends on it."""
        probe = ObjectRef(self.settings.bucket, f"{PROBE_FOLDER}check-{uuid.uuid4()}")
        danger = "two workers could end one job twice. Update the store, or run one worker on this bucket"
        try:
            # First: some stores create a missing bucket when its owner writes to it.
            self._list(probe.bucket, PROBE_FOLDER)
            wrote = [self._storage.put_if_absent(probe, b"{}", content_type=CONTENT_TYPE) for _ in range(2)]
        except NotSupported as error:
            raise CheckFailed(f"{error}: it has no If-None-Match, and {danger}") from error
        except StorageError as error:
            raise CheckFailed(f"cannot be tried: {error}. {self._remedy(error, 'AWS_STORAGE_BUCKET_NAME')}") from error
        finally:
            with suppress(StorageError):
                self._storage.delete(probe)
        if all(wrote):
            raise CheckFailed(f"{self._place} overwrites in spite of If-None-Match: {danger}")
        return "a second writer of one key is refused"

    def _try(self, bucket: str, folder: str, setting: str) -> str:
        """Make each kind of call: a policy can differ from what the store enforces."""
        probe, storage = ObjectRef(bucket, f"{folder}check-{uuid.uuid4()}"), self._storage
        steps: dict[str, Callable[[], object]] = {
            # First, as above.
            "listed": lambda: self._list(bucket, folder),
            "written": lambda: storage.put(probe, b"{}", content_type=CONTENT_TYPE),
            "read": lambda: storage.read(probe, max_bytes=MAX_PROBE_BYTES),
            "cleaned": lambda: storage.delete(probe),
        }
        for verb, step in steps.items():
            try:
                step()
            except StorageError as error:
                # A write that failed may have been done, its answer lost.
                is_removed = verb == "listed" or self._is_removed(probe)
                left = "" if is_removed or verb == "written" else f" {probe} stays: remove it."
                seen = f"{bucket} cannot be {verb}: {error}.{left}"
                raise CheckFailed(f"{seen} {self._remedy(error, setting)}") from error
        return f"{bucket} can be listed, written, read and cleaned"

    def _list(self, bucket: str, folder: str) -> None:
        # Not by a HEAD, whose error has no code to distinguish a wrong key from a missing permission.
        next(self._storage.list_objects(bucket, folder, page_keys=1), None)

    def _is_removed(self, probe: ObjectRef) -> bool:
        try:
            self._storage.delete(probe)
        except StorageError:
            return False
        return True

    def _remedy(self, error: StorageError, setting: str) -> str:
        match error:
            case BucketNotFound():
                return f"Make the bucket, or look at {setting} and AWS_S3_REGION_NAME"
            case AccessDenied():
                key = self.settings.access_key_id or "the instance's role"
                return f"Look at AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and at the rights of {key} on the bucket"
            case _:
                return "Look at AWS_S3_ENDPOINT_URL and at the store's log"

    @property
    def _place(self) -> str:
        return self.settings.endpoint_url or f"AWS in {self.settings.region}"

    @cached_property
    def _storage(self) -> Storage:
        return Storage(self.settings)
