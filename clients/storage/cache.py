"""Cache of downloaded objects on disk: one download for all jobs, pinned while in use, evicted by last use."""

import errno
import hashlib
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from clients.cutoff import acquire, is_cut_off
from clients.storage.client import Storage
from clients.storage.errors import ObjectChanged, StorageError, StorageUnavailable
from clients.storage.location import ObjectRef
from clients.storage.locked_folder import LockedFolder
from clients.storage.objects import ObjectStat, check_size

# Longer than any download may take: older parts were left by a killed process.
STALE_PART_SECONDS = 600.0
PART_SUFFIX = ".part"
# An object replaced between HEAD and GET is tried once more.
MAX_TRIES = 2

_SAFE_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,16}")
# Of complete files. Other files in the folder are neither counted nor removed.
_FILE_NAME = re.compile(r"[0-9a-f]{40}(\.[A-Za-z0-9]{1,16})?")
_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})


class CacheFull(StorageUnavailable):
    """The disk has no room for the object; another worker's may."""


@dataclass
class _Entry:
    """A file that threads wait for or use; `lock` lets one at a time download it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    num_pins: int = 0
    incoming_bytes: int = 0
    error: StorageError | None = None


@dataclass(frozen=True)
class _Wanted:
    """One version of an object, and the limits of its download."""

    ref: ObjectRef
    stat: ObjectStat
    max_bytes: int
    deadline_seconds: float

    @property
    def file_name(self) -> str:
        identity = "\0".join((self.ref.bucket, self.ref.key, self.stat.etag, str(self.stat.size_bytes)))
        suffix = PurePosixPath(self.ref.key).suffix
        digest = hashlib.sha256(identity.encode()).hexdigest()[:40]
        return digest + (suffix if _SAFE_SUFFIX.fullmatch(suffix) else "")


class DownloadCache:
    """Owner of its folder, which is one inside `folder` where another process has locked that; thread-safe.

    A file is one version of an object: bucket, key, ETag and size are in its name, its extension is the key's. The last
    use is the file's modification time, so that the order of eviction survives a restart.
    """

    def __init__(self, storage: Storage, folder: Path, max_bytes: int) -> None:
        """Create `folder` (`~` is the home) where it is missing; raise `OSError` where it cannot be used."""
        self._storage = storage
        self._lock_holder = LockedFolder(folder.expanduser())
        self._folder = self._lock_holder.path
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        with self._part():
            pass  # an unwritable folder fails here, not in each job
        for stale in self._folder.glob(f"*{PART_SUFFIX}"):
            status = _status(stale)
            if status is not None and time.time() - status.st_mtime > STALE_PART_SECONDS:
                stale.unlink(missing_ok=True)

    @property
    def size_bytes(self) -> int:
        """The bytes of all complete files."""
        return sum(size for _, size, _ in self._files())

    @contextmanager
    def fetch(self, ref: ObjectRef, *, max_bytes: int, deadline_seconds: float) -> Iterator[Path]:
        """Yield the path of the object's current version, complete, and not evicted while the block is open.

        Sends a HEAD every time. A thread that waits for another's download gets its error too. Raises
        `StorageError`s; `deadline_seconds` is for the download alone.
        """
        for attempt in range(1, MAX_TRIES + 1):
            wanted = _Wanted(ref, self._storage.head(ref), max_bytes, deadline_seconds)
            # Before eviction: a refused object must evict nothing.
            check_size(ref, wanted.stat, max_bytes)
            with self._pinned(wanted.file_name) as entry:
                try:
                    path = self._ensure(entry, wanted)
                except ObjectChanged:
                    if attempt == MAX_TRIES:
                        raise
                else:
                    yield path
                    return

    @contextmanager
    def _pinned(self, name: str) -> Iterator[_Entry]:
        with self._lock:
            entry = self._entries.setdefault(name, _Entry())
            entry.num_pins += 1
        try:
            yield entry
        finally:
            with self._lock:
                entry.num_pins -= 1
                if entry.num_pins == 0:
                    del self._entries[name]

    def _ensure(self, entry: _Entry, wanted: _Wanted) -> Path:
        path = self._folder / wanted.file_name
        with _held(entry.lock, wanted.ref):
            status = _status(path)
            if status is None or status.st_size != wanted.stat.size_bytes:
                if entry.error is not None:
                    raise type(entry.error)(*entry.error.args) from entry.error
                try:
                    self._make_room(entry, wanted.stat.size_bytes)
                    self._download(path, wanted)
                except StorageError as error:
                    # The entry exists while threads wait: they get the error, a later job tries again. An error by the
                    # thread's own cutoff is not the object's: the next waiting thread takes over.
                    if not is_cut_off():
                        entry.error = error
                    raise
                finally:
                    entry.incoming_bytes = 0
            os.utime(path)
        return path

    def _download(self, path: Path, wanted: _Wanted) -> None:
        try:
            with self._part() as part:
                self._storage.download(
                    wanted.ref,
                    part,
                    stat=wanted.stat,
                    max_bytes=wanted.max_bytes,
                    deadline_seconds=wanted.deadline_seconds,
                )
                with part.open("rb") as file:
                    os.fsync(file.fileno())  # or the rename may survive a crash without the content
                part.replace(path)
        except OSError as error:
            if error.errno not in _FULL_ERRNOS:
                raise
            raise CacheFull(f"{wanted.ref}: no room for {wanted.stat.size_bytes} bytes in the cache") from error

    @contextmanager
    def _part(self) -> Iterator[Path]:
        """Yield a temporary file in the folder, removed at the end of the block unless it was renamed."""
        descriptor, name = tempfile.mkstemp(dir=self._folder, suffix=PART_SUFFIX)
        os.close(descriptor)
        part = Path(name)
        try:
            yield part
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, entry: _Entry, size_bytes: int) -> None:
        """Evict the least recently used files until `size_bytes` more fit; pinned ones stay, even over the limit."""
        with self._lock:
            entry.incoming_bytes = size_bytes
            files = self._files()
            excess = sum(size for _, size, _ in files) - self._max_bytes
            excess += sum(other.incoming_bytes for other in self._entries.values())
            for path, size, _ in sorted(files, key=lambda file: file[2]):
                if excess <= 0:
                    return
                if path.name not in self._entries:
                    path.unlink(missing_ok=True)
                    excess -= size

    def _files(self) -> list[tuple[Path, int, float]]:
        """Return path, size and last use of every complete file."""
        return [
            (path, status.st_size, status.st_mtime)
            for path in self._folder.iterdir()
            if _FILE_NAME.fullmatch(path.name) and (status := _status(path)) is not None
        ]


@contextmanager
def _held(lock: threading.Lock, ref: ObjectRef) -> Iterator[None]:
    if not acquire(lock):
        raise StorageUnavailable(f"{ref}: another download of it takes too long")
    try:
        yield
    finally:
        lock.release()


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None
