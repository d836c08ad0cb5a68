"""A folder for one process alone, whichever others on the host were given the same one."""

import errno
import fcntl
import logging
import os
import weakref
from pathlib import Path

from config.logs import log_event

logger = logging.getLogger(__name__)

# More workers than a host has GPUs: where all are taken, something else is wrong.
MAX_SHARERS = 64
LOCK_NAME = ".lock"
# What a network file system answers that cannot lock a directory, but perhaps a file that is open for writing.
_NO_FOLDER_LOCKS = frozenset({errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})


class ClaimedFolder:
    """`path` is `folder`, or a folder inside it where other processes have that. Held by a lock that ends with this
    object or its process, however that ends; the next process then takes the folder with all that is in it."""

    def __init__(self, folder: Path) -> None:
        """Raises `OSError` where no folder can be made or locked."""
        for number in range(1, MAX_SHARERS + 1):
            self.path = folder if number == 1 else folder / f"worker-{number}"
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = _locked(self.path)
            if descriptor is not None:
                weakref.finalize(self, os.close, descriptor)
                break
        else:
            raise OSError(errno.EBUSY, f"{MAX_SHARERS} processes have claimed it", str(folder))
        if self.path != folder:
            log_event(logger, "folder shared", logging.WARNING, folder=str(folder), instead=str(self.path))


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock; None where another process has it."""
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
