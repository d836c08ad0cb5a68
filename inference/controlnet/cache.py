"""LRU cache of ControlNets by their bytes. Pure bookkeeping, no torch."""

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
    """Owner of the entries. One in use is never evicted; of the others the least recently used goes first.

    Waiting requests try in rounds, the oldest first, and what one found or loaded is not evicted in its round: so two
    requests cannot evict each other's for ever, nor deadlock.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, _Entry[T]] = OrderedDict()
        self._reserved: set[str] = set()

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self._entries.values())

    def begin_round(self) -> None:
        """Begin a round, in which all waiting requests try again."""
        self._reserved.clear()

    def find(self, name: str) -> T | None:
        """Return the entry of that name."""
        entry = self._entries.get(name)
        return entry.value if entry else None

    def get_or_load(self, name: str, num_bytes: int, load: Callable[[], T]) -> T | None:
        """Return the entry of `name`, loaded where it is missing; None where there is no room for it now."""
        if name not in self._entries:
            going: list[str] = []
            missing = self.num_bytes + num_bytes - self._max_bytes
            for other, entry in self._entries.items():
                if missing > 0 and not entry.num_users and other not in self._reserved:
                    going.append(other)
                    missing -= entry.num_bytes
            # Nothing is evicted where that would not suffice.
            if missing > 0:
                return None
            for other in going:
                self.forget(other)
            self._entries[name] = _Entry(load(), num_bytes)
        self._reserved.add(name)
        return self._entries[name].value

    def acquire(self, name: str) -> None:
        """Add a user to an entry."""
        self._entries[name].num_users += 1

    def release(self, name: str) -> None:
        """Remove a user. The entry stays until its memory is needed."""
        self._entries[name].num_users -= 1
        self._entries.move_to_end(name)

    def forget(self, name: str) -> None:
        """Drop an entry without users."""
        del self._entries[name]

    def drop_idle(self, keep: Collection[str | None]) -> bool:
        """Drop the entries without users, except those in `keep`. Returns whether there were any."""
        idle = [name for name, entry in self._entries.items() if not entry.num_users and name not in keep]
        for name in idle:
            self.forget(name)
        return bool(idle)
