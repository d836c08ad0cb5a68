"""The operator's file of presets while the worker runs: read anew when it changes, never half, never a broken one."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from config.logs import log_event
from config.presets.catalog import Presets, PresetsInvalid, load_presets

# A look is one stat: cheap, but not for each of a thousand jobs.
LOOK_SECONDS = 1.0
# Who asks may have a connection to keep alive: a disk that hangs holds it up no longer than that.
PATIENCE_SECONDS = 0.2

logger = logging.getLogger(__name__)


class _Stamp(NamedTuple):
    """What tells a changed file: an editor that replaces it changes the inode, one that writes into it the rest."""

    device: int
    inode: int
    mtime_ns: int
    size_bytes: int


class PresetFile:
    """Owns what was last read of one file of presets that was right. Any thread may ask; none waits for another, nor
    long for the disk."""

    def __init__(
        self,
        path: Path,
        judge: Callable[[Presets], None] = lambda presets: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read the file. `judge` may refuse what is in it; both raise `PresetsInvalid`."""
        self._path = path
        self._judge = judge
        self._clock = clock
        self._looking = threading.Lock()
        self._looked_at = clock()
        # Before the reading: what changes between the two is found at the next look.
        self._stamp = _stamp_of(path)
        self._presets = self._read()

    def current(self) -> Presets:
        """The presets as the file has them, or as it last had them right."""
        now = self._clock()
        # Whoever comes while another looks takes what was right a moment ago.
        if now - self._looked_at >= LOOK_SECONDS and self._looking.acquire(blocking=False):
            self._looked_at = now
            look = threading.Thread(target=self._look_and_release, name="presets", daemon=True)
            look.start()
            look.join(PATIENCE_SECONDS)
        return self._presets

    def _look_and_release(self) -> None:
        try:
            self._look()
        finally:
            self._looking.release()

    def _look(self) -> None:
        stamp = _stamp_of(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._presets = self._read()
        except PresetsInvalid as error:
            log_event(logger, "presets kept as they were", logging.WARNING, reason=str(error))
        else:
            num_styles, num_industries = len(self._presets.styles), len(self._presets.industries)
            log_event(logger, "presets read anew", styles=num_styles, industries=num_industries)

    def _read(self) -> Presets:
        presets = load_presets(self._path)
        self._judge(presets)
        return presets


def _stamp_of(path: Path) -> _Stamp | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return _Stamp(stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size)
