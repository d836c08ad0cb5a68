"""Which adapters are in the model, and which pages of the bank each of them fills. Pure bookkeeping, no torch."""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

# Page 0 is never handed out and holds zeros: rows with fewer pages than others are filled up with it.
ZERO_PAGE = 0


@dataclass(slots=True)
class Slot:
    """One resident adapter: its pages, and how many lanes use it now."""

    pages: tuple[int, ...]
    num_users: int = 0


class Slots:
    """Owner of the pages. An adapter in use is never evicted; of the others the least recently used goes first."""

    def __init__(self, num_slots: int, num_pages: int) -> None:
        """`num_pages` beside the zero page."""
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
        """The slot of a resident adapter."""
        return self._slots.get(key)

    def has_room(self, wanted: dict[Hashable, int]) -> bool:
        """Could these adapters (pages of each) be resident together, beside all that are in use now?"""
        others = [slot for key, slot in self._slots.items() if slot.num_users and key not in wanted]
        resident = [slot for key, slot in self._slots.items() if key in wanted]
        num_held = sum(len(slot.pages) for slot in others + resident)
        num_new = sum(num_pages for key, num_pages in wanted.items() if key not in self._slots)
        return len(others) + len(wanted) <= self._num_slots and num_held + num_new <= self.num_pages

    def acquire(self, key: Hashable) -> Slot:
        """Use a resident adapter once more."""
        slot = self._slots[key]
        slot.num_users += 1
        return slot

    def load(self, key: Hashable, num_pages: int) -> Slot:
        """A slot for a new adapter, evicting idle ones as needed. Call only where `has_room` said so."""
        while len(self._slots) >= self._num_slots or len(self._free) < num_pages:
            self._evict_oldest()
        slot = Slot(tuple(self._free.pop() for _ in range(num_pages)))
        self._slots[key] = slot
        return slot

    def unload(self, key: Hashable) -> None:
        """Forget an adapter that nobody uses."""
        self._free += self._slots.pop(key).pages

    def forget(self, key: Hashable) -> None:
        """Unload an adapter that nobody uses, if it is resident."""
        if key in self._slots:
            self.unload(key)

    def release(self, key: Hashable) -> None:
        """One lane fewer uses it. It stays until its place is needed."""
        self._slots[key].num_users -= 1
        self._slots.move_to_end(key)

    def _evict_oldest(self) -> None:
        key = next(key for key, slot in self._slots.items() if not slot.num_users)
        self.unload(key)
