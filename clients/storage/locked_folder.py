"""A folder locked by one process, among several on the host that are configured with the same one."""

import errno
import fcntl
import logging
import os
import weakref
from pathlib import Path

from config.logs import log_event

logger = logging.getLogger(__name__)

# More workers than a host has GPUs.
MAX_SHARERS = 64
LOCK_NAME = ".lock"
# Errors of network file systems that cannot lock a directory, but perhaps a file that is open for writing.
_NO_FOLDER_LOCKS = frozenset({errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})


class LockedFolder:
    """Owner of the lock of `path`: `folder`, or a folder inside it where other processes hold that.

    The lock ends with this object or its process, also by SIGKILL; the next process then gets the folder and its files.
    """

    def __init__(self, folder: Path) -> None:
        """Create and lock the first free folder; raise `OSError` where none can be made or locked."""
        for number in range(1, MAX_SHARERS + 1):
            self.path = folder if number == 1 else folder / f"worker-{number}"
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = _lock_folder(self.path)
            if descriptor is not None:
                weakref.finalize(self, os.close, descriptor)
                break
        else:
            raise OSError(errno.EBUSY, f"{MAX_SHARERS} processes have claimed it", str(folder))
        if self.path != folder:
            log_event(logger, "folder shared", logging.WARNING, folder=str(folder), instead=str(self.path))


def _lock_folder(folder: Path) -> int | None:
    """Return a descriptor that holds the folder's lock; None where another process has it."""
    try:
        return _lock(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
    except OSError as error:
        if error.errno not in _NO_FOLDER_LOCKS:
            raise
        return _lock(os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600))


def _lock(descriptor: int) -> int | None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
