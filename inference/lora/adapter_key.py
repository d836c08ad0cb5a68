"""The identity of an adapter, and an adapter that was read under it."""

from pathlib import Path
from typing import NamedTuple

from inference.lora.bank import PackedAdapter
from inference.request import AdapterFile, Stage


class AdapterKey(NamedTuple):
    """Identity of an adapter in the bank: its version, or else its files' inode, size and modification time."""

    version: str
    weights: tuple[str, int, int, int] | None = None
    config: tuple[str, int, int, int] | None = None

    @classmethod
    def of(cls, file: AdapterFile) -> "AdapterKey":
        """Return the key of a file. Raises `OSError` where one without a version is missing."""
        # A download cache touches its files at every use: their times say nothing of their content.
        if file.version:
            return cls(file.version)
        return cls("", _identity(file.weights), None if file.config is None else _identity(file.config))


class ReadAdapter(NamedTuple):
    """A packed adapter, and the stage of its reading."""

    packed: PackedAdapter
    stage: Stage


def _identity(path: Path) -> tuple[str, int, int, int]:
    status = path.stat()
    return str(path), status.st_ino, status.st_size, status.st_mtime_ns
