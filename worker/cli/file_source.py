"""Files of this machine as a job's inputs."""

from contextlib import ExitStack
from pathlib import Path

from clients.storage.errors import ObjectNotFound, ObjectTooLarge
from clients.storage.location import LocationForbidden, ObjectRef, shown_location
from worker.jobs.inputs.source import FetchedFile

# A file of this machine is an object of no bucket; its path is the key.
NO_BUCKET = ""


class FileUnreadable(Exception):
    """A file cannot be read; the message names it."""


def local_file(text: str) -> ObjectRef:
    """Return the file at path `text`. Raises `LocationForbidden` for a URL."""
    if "://" in text:
        raise LocationForbidden(f"{shown_location(text)} is in a store, which is not read here: name a file")
    return ObjectRef(NO_BUCKET, text)


class FileSource:
    """`ObjectSource` of the files of this machine. Raises `FileUnreadable` where one exists and cannot be read."""

    def read(self, ref: ObjectRef, max_bytes: int) -> bytes:
        """Return the file's content."""
        path = _path_of(ref, max_bytes)
        try:
            return path.read_bytes()
        except OSError as error:
            raise FileUnreadable(f"{path} cannot be read ({error.strerror})") from error

    def fetch(self, ref: ObjectRef, max_bytes: int, _pinned: ExitStack) -> FetchedFile:
        """Return the file where it is."""
        path = _path_of(ref, max_bytes)
        return FetchedFile(path, version=str(path))

    def exists(self, ref: ObjectRef) -> bool:
        """Return whether there is such a file."""
        return Path(ref.key).is_file()


def _path_of(ref: ObjectRef, max_bytes: int) -> Path:
    path = Path(ref.key)
    try:
        num_bytes = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ObjectNotFound(f"{path} does not exist") from error
    except OSError as error:
        raise FileUnreadable(f"{path} cannot be read ({error.strerror})") from error
    if path.is_dir():
        raise FileUnreadable(f"{path} is a folder")
    if num_bytes > max_bytes:
        raise ObjectTooLarge(f"{path} has {num_bytes} bytes, more than {max_bytes}")
    return path
