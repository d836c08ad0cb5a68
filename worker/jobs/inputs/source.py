"""`ObjectSource`: the interface that reads the objects a job names."""

from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Protocol

from clients.storage.location import ObjectRef


class FetchedFile(NamedTuple):
    """A file on the local disk; equal versions are the same bytes."""

    path: Path
    version: str


class ObjectSource(Protocol):
    """Reads the objects that a job names: those of the store, or the files of this machine.

    Raises `ObjectNotFound` and `ObjectTooLarge`; any other error is not the job's fault.
    """

    def read(self, ref: ObjectRef, max_bytes: int) -> bytes:
        """Return the object's content."""

    def fetch(self, ref: ObjectRef, max_bytes: int, pinned: ExitStack) -> FetchedFile:
        """Return the object as a file, which stays until `pinned` closes."""

    def exists(self, ref: ObjectRef) -> bool:
        """Return whether the object is there and may be read."""
