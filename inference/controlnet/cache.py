"""Which ControlNets are kept, and which of them give way to another. Pure bookkeeping, no torch."""

from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class _Entry(Generic[T]):
    value: T
    num_bytes: int
    num_users: int = 0


class ControlNetCache(Generic[T]):
    """Owner of the places. What is in use never gives way; of the rest the least recently used goes first.

    Those that wait ask in rounds, the oldest first, and none takes what an older one waits for: so two of them cannot
    push each other's out for ever, nor wait for each other.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, _Entry[T]] = OrderedDict()
        self._reserved: set[str] = set()

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self._entries.values())

    def begin_round(self) -> None:
        """All that wait are going to ask again."""
        self._reserved.clear()

    def find(self, name: str) -> T | None:
        """What is kept under that name."""
        entry = self._entries.get(name)
        return entry.value if entry else None

    def get_or_load(self, name: str, num_bytes: int, load: Callable[[], T]) -> T | None:
        """What is kept under `name`, or what `bring` gives to be kept there; None where there is no room for it now."""
        if name not in self._entries:
            if not self._make_room(num_bytes):
                return None
            self._entries[name] = _Entry(load(), num_bytes)
        self._reserved.add(name)
        return self._entries[name].value

    def acquire(self, name: str) -> None:
        """Use what is there once more."""
        self._entries[name].num_users += 1

    def release(self, name: str) -> None:
        """One request fewer uses it. It stays until its place is needed."""
        self._entries[name].num_users -= 1
        self._entries.move_to_end(name)

    def forget(self, name: str) -> None:
        """Keep it no longer; nobody uses it."""
        del self._entries[name]

    def drop_idle(self, keep: Collection[str | None]) -> bool:
        """Forget all that are not in use, but for those in `keep`; were there any?"""
        idle = [name for name, entry in self._entries.items() if not entry.num_users and name not in keep]
        for name in idle:
            self.forget(name)
        return bool(idle)

    def _make_room(self, num_bytes: int) -> bool:
        """Let go of as many as must be; of none where that would not be enough."""
        going: list[str] = []
        missing = self.num_bytes + num_bytes - self._max_bytes
        for name, entry in self._entries.items():
            if missing > 0 and not entry.num_users and name not in self._reserved:
                going.append(name)
                missing -= entry.num_bytes
        if missing > 0:
            return False
        for name in going:
            self.forget(name)
        return True
