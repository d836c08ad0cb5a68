"""Check the store: its answer, its clock, both buckets with every kind of call, conditional writes."""

import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from clients.storage.client import Storage
from clients.storage.errors import AccessDenied, BucketNotFound, NotSupported, ObjectNotFound, StorageError
from clients.storage.location import ObjectRef
from config.store import StoreSettings
from worker.cli.check.checks import CheckFailed

# Stores refuse a clock that is wrong by 900 seconds; receivers of signed webhooks one that is by 300.
MAX_SKEW_SECONDS = 300.0
MAX_PROBE_BYTES = 16
# Where the ledger tries conditional writes too.
PROBE_FOLDER = ".darkroom/"
# The folders that a worker writes: records with leases, its own notes, stages of products; pictures.
PRIVATE_FOLDERS, RESULTS_FOLDERS = ("jobs/", PROBE_FOLDER, "stages/"), ("generations/",)
PREVIEWS_FOLDER = "previews/"
CONTENT_TYPE = "application/json"
LIST_BUCKET = "s3:ListBucket"


class _Step(NamedTuple):
    """A call, the action of S3 that it needs a right for, and the word for what it does to a bucket."""

    verb: str
    action: str
    call: Callable[[], object]


@dataclass(frozen=True)
class StoreProbe:
    """Checks of the store. What is written is removed. Each returns what was seen or raises `CheckFailed`."""

    settings: StoreSettings
    has_previews: bool = False

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
        """List, write, read and clean the private bucket, in each folder that a worker writes."""
        return self._try(self.settings.bucket, PRIVATE_FOLDERS, "AWS_STORAGE_BUCKET_NAME")

    def results_bucket(self) -> str:
        """List, write, read and clean the bucket of the results, in each folder that a worker writes."""
        folders = (*RESULTS_FOLDERS, PREVIEWS_FOLDER) if self.has_previews else RESULTS_FOLDERS
        return self._try(self.settings.results_bucket, folders, "AWS_RESULTS_BUCKET_NAME")

    def input_buckets(self) -> str:
        """Look for an object that is not there in each other bucket that jobs may read, which takes both rights."""
        others = sorted(self.settings.allowed_buckets - {self.settings.bucket, self.settings.results_bucket})
        return "; ".join(map(self._look_into, others))

    def _look_into(self, bucket: str) -> str:
        try:
            self._list(bucket, PROBE_FOLDER)
        except AccessDenied:
            # Then a missing object is refused like a forbidden one, so reading cannot be tried. Jobs can work.
            needed = f"{LIST_BUCKET} on arn:aws:s3:::{bucket}"
            return f"{bucket} may not be listed, so that what is missing there fails as INPUT_FORBIDDEN: {needed}"
        except StorageError as error:
            remedy = self._remedy(error, "ALLOWED_BUCKETS", LIST_BUCKET, bucket)
            raise CheckFailed(f"{bucket} cannot be listed: {error}. {remedy}") from error
        try:
            self._storage.read(ObjectRef(bucket, f"{PROBE_FOLDER}check-{uuid.uuid4()}"), max_bytes=MAX_PROBE_BYTES)
        except ObjectNotFound:
            return f"{bucket} can be listed and read"
        except AccessDenied as error:
            # Perhaps some prefixes may be read.
            remedy = self._remedy(error, "ALLOWED_BUCKETS", "s3:GetObject", f"{bucket}/*")
            return f"{bucket} cannot be read everywhere: {error}. {remedy}, or on the prefixes that jobs name"
        except StorageError as error:
            raise CheckFailed(f"{bucket} cannot be read: {error}") from error
        return f"{bucket} can be listed and read"

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
            remedy = self._remedy(error, "AWS_STORAGE_BUCKET_NAME", "s3:PutObject", f"{probe.bucket}/{PROBE_FOLDER}*")
            raise CheckFailed(f"cannot be tried: {error}. {remedy}") from error
        finally:
            with suppress(StorageError):
                self._storage.delete(probe)
        if all(wrote):
            raise CheckFailed(f"{self._place} overwrites in spite of If-None-Match: {danger}")
        return "a second writer of one key is refused"

    def _try(self, bucket: str, folders: tuple[str, ...], setting: str) -> str:
        """Make each kind of call: a policy can differ from what the store enforces."""
        for folder in folders:
            # Leases may be deleted, and records not: the probe has a lease's name.
            self._try_folder(ObjectRef(bucket, f"{folder}check-{uuid.uuid4()}.lease"), folder, setting)
        return f"{bucket} can be listed, written, read and cleaned"

    def _try_folder(self, probe: ObjectRef, folder: str, setting: str) -> None:
        storage = self._storage
        steps = (
            # First, as above.
            _Step("listed", LIST_BUCKET, lambda: self._list(probe.bucket, folder)),
            _Step("written", "s3:PutObject", lambda: storage.put(probe, b"{}", content_type=CONTENT_TYPE)),
            _Step("read", "s3:GetObject", lambda: storage.read(probe, max_bytes=MAX_PROBE_BYTES)),
            _Step("cleaned", "s3:DeleteObject", lambda: storage.delete(probe)),
        )
        for step in steps:
            try:
                step.call()
            except StorageError as error:
                # A write that failed may have been done, its answer lost.
                is_removed = step.action == LIST_BUCKET or self._is_removed(probe)
                left = "" if is_removed or step.verb == "written" else f" {probe} stays: remove it."
                seen = f"{probe.bucket} cannot be {step.verb}: {error}.{left}"
                resource = probe.bucket if step.action == LIST_BUCKET else f"{probe.bucket}/{folder}*"
                raise CheckFailed(f"{seen} {self._remedy(error, setting, step.action, resource)}") from error

    def _list(self, bucket: str, folder: str) -> None:
        # Not by a HEAD, whose error has no code to distinguish a wrong key from a missing permission.
        next(self._storage.list_objects(bucket, folder, page_keys=1), None)

    def _is_removed(self, probe: ObjectRef) -> bool:
        try:
            self._storage.delete(probe)
        except StorageError:
            return False
        return True

    def _remedy(self, error: StorageError, setting: str, action: str, resource: str) -> str:
        match error:
            case BucketNotFound():
                return f"Make the bucket, or look at {setting} and AWS_S3_REGION_NAME"
            case AccessDenied():
                key = self.settings.access_key_id or "the instance's role"
                needed = f"it needs {action} on arn:aws:s3:::{resource}, as docs/bucket-rights.md has it"
                return f"Look at AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and at the rights of {key}: {needed}"
            case _:
                return "Look at AWS_S3_ENDPOINT_URL and at the store's log"

    @property
    def _place(self) -> str:
        return self.settings.endpoint_url or f"AWS in {self.settings.region}"

    @cached_property
    def _storage(self) -> Storage:
        return Storage(self.settings)
