"""Check that the address of a result opens, for a reader who has it and nothing else."""

import uuid
from contextlib import suppress

from clients.anonymous_reader import read_anonymously
from clients.storage.client import Storage
from clients.storage.errors import StorageError
from clients.storage.location import ObjectRef
from config.store import StoreSettings
from worker.cli.check.checks import CheckFailed, CheckUnsure

# Among the results, as a policy for readers may have their folder alone.
PROBE_PREFIX = "generations/check-"
CONTENT = b"a result"
OK = 200


def check_result_address(settings: StoreSettings) -> str:
    """Store a probe among the results and GET its address as a reader would.

    Plain addresses are reported as they are: who reads them may have rights of his own. A presigned one must open.
    """
    storage, probe = Storage(settings), ObjectRef(settings.results_bucket, f"{PROBE_PREFIX}{uuid.uuid4()}")
    plain = storage.public_url(probe).replace(probe.key, "generations/…")
    try:
        # First: some stores create a missing bucket when its owner writes to it.
        storage.check_bucket(probe.bucket)
        storage.put(probe, CONTENT, content_type="text/plain")
        url = storage.result_url(probe)
        is_temporary = "-Security-Token=" in url
        seen = _open(url)
    except StorageError as error:
        raise CheckFailed(f"no address can be tried: {error}") from error
    finally:
        with suppress(StorageError):
            storage.delete(probe)
    if settings.presigned_seconds is None:
        return _describe_plain(plain, seen)
    if seen is None:
        raise CheckUnsure(
            f"{plain} cannot be reached from here. Where readers can, all is well; else RESULT_URL_BASE must be the "
            "results bucket's address as they reach it"
        )
    if seen != "":
        raise CheckFailed(
            f"{plain} does not open: {seen}. RESULT_URL_BASE must lead to the store itself with host and path as they "
            f"are, and the key needs s3:GetObject on arn:aws:s3:::{probe.bucket}/generations/*"
        )
    until = ", or until the temporary credentials that signed it end" if is_temporary else ""
    return f"{plain} opens for {settings.presigned_seconds} s{until}"


def _describe_plain(url: str, seen: str | None) -> str:
    if seen == "":
        return f"{url} opens without credentials"
    reason = "cannot be reached from here" if seen is None else f"does not open without credentials ({seen})"
    return f"{url} {reason}: RESULT_URL_MODE=presigned:SECONDS makes addresses that do"


def _open(url: str) -> str | None:
    """GET the address; return "" where it has the probe's content, else what it has; None without an answer."""
    answer = read_anonymously(url, max_bytes=len(CONTENT) + 1)
    if answer is None:
        return None
    if answer.status != OK:
        return f"HTTP {answer.status}"
    return "" if answer.content == CONTENT else "another content"
