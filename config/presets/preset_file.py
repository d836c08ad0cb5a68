"""Reload the operator's file of presets when it changes; the last valid version stays in use until then."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from config.logs import log_event
from config.presets.catalog import Presets, PresetsInvalid, load_presets

# A check is one stat: cheap, but not for each of a thousand jobs.
CHECK_SECONDS = 1.0
# The caller may have a connection to keep alive: a disk that hangs delays it no longer than that.
RELOAD_WAIT_SECONDS = 0.2

logger = logging.getLogger(__name__)


class _Stamp(NamedTuple):
    """File identity for detecting a change: replacing the file changes the inode, writing into it the rest."""

    device: int
    inode: int
    mtime_ns: int
    size_bytes: int


class PresetFile:
    """Owner of the last valid presets of one file; thread-safe. No thread waits for another, nor long for the disk."""

    def __init__(
        self,
        path: Path,
        validate: Callable[[Presets], None] = lambda presets: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read the file. `validate` may refuse its presets; both raise `PresetsInvalid`."""
        self._path = path
        self._validate = validate
        self._clock = clock
        self._check_lock = threading.Lock()
        self._checked_at = clock()
        # Before reading: a change between the two is found at the next check.
        self._stamp = _stamp_of(path)
        self._presets = load_presets(path)
        validate(self._presets)

    def current(self) -> Presets:
        """Return the presets in the file, or its last valid ones."""
        now = self._clock()
        # A thread that comes during another's check gets the presets before it.
        if now - self._checked_at >= CHECK_SECONDS and self._check_lock.acquire(blocking=False):
            self._checked_at = now
            check = threading.Thread(target=self._reload, name="presets", daemon=True)
            check.start()
            check.join(RELOAD_WAIT_SECONDS)
        return self._presets

    def _reload(self) -> None:
        """Read the file where it has changed, and release the lock of the check."""
        try:
            stamp = _stamp_of(self._path)
            if stamp == self._stamp:
                return
            self._stamp = stamp
            presets = load_presets(self._path)
            self._validate(presets)
            self._presets = presets
        except PresetsInvalid as error:
            log_event(logger, "presets kept as they were", logging.WARNING, reason=str(error))
        else:
            num_styles, num_industries = len(self._presets.styles), len(self._presets.industries)
            log_event(logger, "presets read anew", styles=num_styles, industries=num_industries)
        finally:
            self._check_lock.release()


def _stamp_of(path: Path) -> _Stamp | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return _Stamp(stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size)
