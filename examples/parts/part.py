"""What every part has in common: it starts, it stops, and a `with` block does both."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Part(ABC):
    """A real server of a demo or a test; used as a context manager it is stopped whatever happens."""

    @abstractmethod
    def start(self) -> None:
        """Start and return once the part answers."""

    @abstractmethod
    def stop(self) -> None:
        """Stop and leave nothing running. A part that is stopped already stays so."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
