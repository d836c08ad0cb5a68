"""Download one object: retried where the body breaks off, checked against its size and MD5, at a minimum rate."""

import hashlib
import time
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from clients.deadline import DeadlineTimer, deadline
from clients.storage.digest import DigestCheck
from clients.storage.errors import ObjectChanged, ObjectDamaged, StorageUnavailable, translate_errors
from clients.storage.location import ObjectRef
from clients.storage.objects import WEAK, ObjectStat, check_size, stat_of

# boto3 does not retry a body that breaks off; half a second lets a restarting proxy come back.
MAX_DOWNLOAD_TRIES = 3
RETRY_PAUSE_SECONDS = 0.5
CHUNK_BYTES = 1 << 18
# Slower than this, a download holds a job's place without hope of ending in useful time.
MIN_RATE_BYTES_PER_SECOND = 64_000
RATE_WINDOW_SECONDS = 10.0


class RateMonitor:
    """Checks that a stream keeps the minimum rate, window by window."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._window_start = clock()
        self._window_bytes = 0

    def is_too_slow(self, num_bytes: int) -> bool:
        """Count `num_bytes` that just arrived; return True at the end of a window below the minimum rate."""
        self._window_bytes += num_bytes
        elapsed = self._clock() - self._window_start
        if elapsed < RATE_WINDOW_SECONDS:
            return False
        rate = self._window_bytes / elapsed
        self._window_start += elapsed
        self._window_bytes = 0
        return rate < MIN_RATE_BYTES_PER_SECOND


def download_object(
    client: Any, ref: ObjectRef, sink: BinaryIO, *, stat: ObjectStat | None, max_bytes: int, deadline_seconds: float
) -> None:
    """Write the object to `sink`; raise `ObjectChanged` where it is not the one that `stat` describes, if given."""
    if stat is not None:
        check_size(ref, stat, max_bytes)
    check = DigestCheck(ref)
    with deadline(deadline_seconds) as timer:
        for attempt in range(1, MAX_DOWNLOAD_TRIES + 1):
            try:
                response, md5 = _download_once(client, ref, sink, stat=stat, max_bytes=max_bytes, timer=timer)
                check.verify(response, md5)
            except (ObjectDamaged, StorageUnavailable) as error:
                if isinstance(error, ObjectChanged) or timer.is_expired or attempt == MAX_DOWNLOAD_TRIES:
                    raise
                time.sleep(RETRY_PAUSE_SECONDS)
            else:
                return


def _download_once(
    client: Any, ref: ObjectRef, sink: BinaryIO, *, stat: ObjectStat | None, max_bytes: int, timer: DeadlineTimer
) -> tuple[Mapping[str, Any], str]:
    """Return the response to the GET, and the MD5 of its body in hex."""
    condition = {} if stat is None or stat.etag.startswith(WEAK) else {"IfMatch": f'"{stat.etag}"'}
    sink.seek(0)
    sink.truncate()
    with translate_errors(ref):
        response = client.get_object(Bucket=ref.bucket, Key=ref.key, **condition)
        with response["Body"] as raw:
            found = stat_of(ref, response)
            if stat is not None and found != stat:
                raise ObjectChanged(f"{ref}: not the object that was there before")
            check_size(ref, found, max_bytes)
            return response, _copy_body(ref, raw, sink, found.size_bytes, timer)


def _copy_body(ref: ObjectRef, raw: Any, sink: BinaryIO, size_bytes: int, timer: DeadlineTimer) -> str:
    """Copy exactly `size_bytes` from `raw` to `sink`; return their MD5 in hex."""
    digest = hashlib.md5(usedforsecurity=False)
    rate = RateMonitor()
    num_bytes = 0
    # read1 gives what has arrived; read would wait for a full chunk, which a slow stream never fills.
    while chunk := raw.read1(CHUNK_BYTES):
        num_bytes += len(chunk)
        if num_bytes > size_bytes:
            break
        digest.update(chunk)
        sink.write(chunk)
        if rate.is_too_slow(len(chunk)):
            raise StorageUnavailable(f"{ref}: arrives at under {MIN_RATE_BYTES_PER_SECOND} bytes a second")
    if num_bytes != size_bytes:
        timer.raise_if_expired()
        raise ObjectDamaged(f"{ref}: {num_bytes} bytes arrived of {size_bytes}")
    return digest.hexdigest()
