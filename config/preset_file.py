"""The operator's file of presets while the worker runs: read anew when it changes, never half, never a broken one."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from config.logs import log_event
from config.presets import Presets, PresetsInvalid, load_presets

# A look is one stat: cheap, but not for each of a thousand jobs.
LOOK_SECONDS = 1.0

logger = logging.getLogger(__name__)


class _Stamp(NamedTuple):
    """What tells a changed file: an editor that replaces it changes the inode, one that writes into it the rest."""

    device: int
    inode: int
    mtime_ns: int
    size_bytes: int


class PresetFile:
    """Owns what was last read of one file of presets that was right. Any thread may ask; none waits for another."""

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
        # Whoever comes while another looks takes what was right a moment ago.
        if self._looking.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._looking.release()
        return self._presets

    def _look(self) -> None:
        now = self._clock()
        if now - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = now
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
