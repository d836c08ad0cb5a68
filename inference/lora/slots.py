"""Slots of resident adapters and their pages of the bank. Pure bookkeeping, no torch."""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

# Page 0 is never allocated, and holds zeros.
ZERO_PAGE = 0


@dataclass(slots=True)
class Slot:
    """One resident adapter: its pages, and the number of lanes that use it."""

    pages: tuple[int, ...]
    num_users: int = 0


class Slots:
    """Owner of the pages. An adapter in use is never evicted; of the others the least recently used goes first."""

    def __init__(self, num_slots: int, num_pages: int) -> None:
        """Own `num_pages` pages beside the zero page."""
        self._num_slots = num_slots
        self.num_pages = num_pages
        self._slots: OrderedDict[Hashable, Slot] = OrderedDict()
        self._free = list(range(num_pages, 0, -1))

    @property
    def num_active(self) -> int:
        return sum(slot.num_users > 0 for slot in self._slots.values())

    @property
    def num_idle(self) -> int:
        return len(self._slots) - self.num_active

    @property
    def num_free(self) -> int:
        return self._num_slots - len(self._slots)

    def find(self, key: Hashable) -> Slot | None:
        """Return the slot of a resident adapter."""
        return self._slots.get(key)

    def has_room(self, wanted: dict[Hashable, int]) -> bool:
        """Return whether these adapters (pages of each) fit together beside all that are in use now."""
        others = [slot for key, slot in self._slots.items() if slot.num_users and key not in wanted]
        resident = [slot for key, slot in self._slots.items() if key in wanted]
        num_held = sum(len(slot.pages) for slot in others + resident)
        num_new = sum(num_pages for key, num_pages in wanted.items() if key not in self._slots)
        return len(others) + len(wanted) <= self._num_slots and num_held + num_new <= self.num_pages

    def acquire(self, key: Hashable) -> Slot:
        """Add a user to a resident adapter."""
        slot = self._slots[key]
        slot.num_users += 1
        return slot

    def load(self, key: Hashable, num_pages: int) -> Slot:
        """Allocate a slot for a new adapter, evicting idle ones as needed. `has_room` must be true."""
        while len(self._slots) >= self._num_slots or len(self._free) < num_pages:
            self.unload(next(oldest for oldest, slot in self._slots.items() if not slot.num_users))
        slot = Slot(tuple(self._free.pop() for _ in range(num_pages)))
        self._slots[key] = slot
        return slot

    def unload(self, key: Hashable) -> None:
        """Unload an adapter without users."""
        self._free += self._slots.pop(key).pages

    def forget(self, key: Hashable) -> None:
        """Unload an adapter without users, if it is resident."""
        if key in self._slots:
            self.unload(key)

    def clear(self) -> None:
        """Unload all adapters; none has users."""
        for key in tuple(self._slots):
            self.unload(key)

    def release(self, key: Hashable) -> None:
        """Remove a user. The adapter stays resident until its pages are needed."""
        self._slots[key].num_users -= 1
        self._slots.move_to_end(key)
