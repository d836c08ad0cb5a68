"""Which adapters stay in the bank and which give way, decided without a model."""

import copy
from collections.abc import Hashable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from inference.lora.slots import ZERO_PAGE, Slots


def slots_with(*keys: str, num_slots: int = 3, num_pages: int = 6) -> Slots:
    """Load idle adapters of two pages each, in this order."""
    slots = Slots(num_slots, num_pages)
    for key in keys:
        slots.load(key, 2)
    return slots


def counts(slots: Slots) -> tuple[int, int, int]:
    return slots.num_active, slots.num_idle, slots.num_free


def residents(slots: Slots, keys: str) -> str:
    return "".join(key for key in keys if slots.find(key))


# --- One adapter


def test_an_adapter_that_was_never_loaded_has_no_slot() -> None:
    slots = slots_with()

    assert slots.find("a") is None
    with pytest.raises(KeyError):
        slots.acquire("a")


def test_an_adapter_is_idle_until_it_is_used_and_stays_when_it_no_longer_is() -> None:
    slots = slots_with()
    assert counts(slots) == (0, 0, 3)

    slot = slots.load("a", 2)
    assert counts(slots) == (0, 1, 2)

    assert slots.acquire("a") is slot is slots.find("a")
    assert counts(slots) == (1, 0, 2)

    slots.release("a")
    assert counts(slots) == (0, 1, 2)
    assert slots.find("a") is slot


def test_adapter_is_in_use_until_its_last_lane_releases_it() -> None:
    slots = slots_with("a")
    slots.acquire("a")
    slots.acquire("a")

    slots.release("a")
    assert counts(slots) == (1, 0, 2)

    slots.release("a")
    assert counts(slots) == (0, 1, 2)


def test_all_pages_but_the_zero_page_are_allocated() -> None:
    slots = slots_with("a", "b", "c")

    pages = [page for key in "abc" for page in (slots.find(key) or pytest.fail(key)).pages]

    assert sorted(pages) == [1, 2, 3, 4, 5, 6]
    assert ZERO_PAGE not in pages


# --- Giving way


def test_nothing_is_evicted_while_there_is_room() -> None:
    slots = slots_with("a", "b")

    slots.load("c", 2)

    assert residents(slots, "abc") == "abc"


def test_first_loaded_adapter_is_evicted_when_none_was_used() -> None:
    slots = slots_with("a", "b", "c")

    slots.load("d", 2)

    assert residents(slots, "abcd") == "bcd"


def test_least_recently_released_adapter_is_evicted() -> None:
    # Given one that a long job used from the first to the last, and others used meanwhile
    slots = slots_with("a", "b", "c")
    for key in "abc":
        slots.acquire(key)
    for key in "cba":
        slots.release(key)

    # When there is need of a slot, and of another
    slots.load("d", 2)
    assert residents(slots, "abcd") == "abd"
    slots.load("e", 2)

    # Then the long job's, just used, is the last to go
    assert residents(slots, "abde") == "ade"


def test_adapter_in_use_is_not_evicted_though_loaded_first() -> None:
    slots = slots_with("a", "b", "c")
    slots.acquire("a")

    slots.load("d", 2)

    assert residents(slots, "abcd") == "acd"


def test_a_large_adapter_takes_the_pages_of_several() -> None:
    slots = slots_with("a", "b", "c")

    slot = slots.load("d", 4)

    assert residents(slots, "abcd") == "cd"
    assert len(set(slot.pages)) == 4


def test_two_adapters_of_one_lane_do_not_evict_each_other() -> None:
    slots = slots_with("a", "b", "c")
    slots.acquire("c")
    assert slots.has_room({"d": 2, "e": 2})

    slots.load("d", 2)
    slots.load("e", 2)

    assert residents(slots, "abcde") == "cde"


# --- Room


@pytest.mark.parametrize(
    ("used", "wanted", "is_room"),
    [
        ("", {}, True),
        ("abc", {}, True),
        ("abc", {"a": 2, "b": 2, "c": 2}, True),  # all there
        ("abc", {"d": 1}, False),  # no slot
        ("ab", {"d": 2}, True),
        ("ab", {"d": 3}, False),  # a slot but too few pages
        ("ab", {"c": 2, "d": 1}, False),  # what is wanted cannot give way
        ("a", {"a": 2, "d": 2, "e": 2}, True),  # what is wanted and used counts once
        ("", {"d": 6}, True),
        ("", {"d": 7}, False),
        ("", {"d": 1, "e": 1, "f": 1, "g": 1}, False),
    ],
)
def test_has_room_counts_pages_not_in_use(used: str, wanted: dict[Hashable, int], is_room: bool) -> None:
    slots = slots_with("a", "b", "c")
    for key in used:
        slots.acquire(key)

    assert slots.has_room(wanted) is is_room
    assert residents(slots, "abc") == "abc"  # asking changes nothing


# --- In any order

KEYS = "abcdef"


class AnyOrder(RuleBasedStateMachine):
    """Lanes take adapters and let them go in any order."""

    @initialize(num_slots=st.integers(0, 4), num_pages=st.integers(0, 8))
    def begin(self, num_slots: int, num_pages: int) -> None:
        self.num_slots, self.num_pages = num_slots, num_pages
        self.slots = Slots(num_slots, num_pages)
        self.pages: dict[Hashable, tuple[int, ...]] = {}  # of each resident, the least recently used first
        self.users: list[Hashable] = []  # one for each use

    @rule(wanted=st.dictionaries(st.sampled_from(KEYS), st.integers(0, 4), max_size=3))
    def join(self, wanted: dict[Hashable, int]) -> None:
        is_room = self.slots.has_room(wanted)
        assert is_room == self._can_join(wanted)
        if not is_room:
            return

        for key in sorted(wanted, key=lambda key: key not in self.pages):
            if key in self.pages:
                assert self.slots.acquire(key).pages == self.pages[key]
            else:
                self._load(key, wanted[key])
                self.slots.acquire(key)
            self.users.append(key)

        assert all(self.slots.find(key) for key in wanted)

    @precondition(lambda self: self.users)
    @rule(number=st.integers(0, 20))
    def leave(self, number: int) -> None:
        key = self.users.pop(number % len(self.users))
        self.slots.release(key)
        self.pages[key] = self.pages.pop(key)

    @rule(key=st.sampled_from(KEYS), num_pages=st.integers(0, 4))
    def load_ahead(self, key: str, num_pages: int) -> None:
        if key not in self.pages and self.slots.has_room({key: num_pages}):
            self._load(key, num_pages)

    @invariant()
    def pages_are_handed_out_once_and_the_zero_page_never(self) -> None:
        pages = [page for resident in self.pages.values() for page in resident]

        assert len(pages) == len(set(pages))
        assert set(pages) <= set(range(1, self.num_pages + 1)) - {ZERO_PAGE}

    @invariant()
    def residents_are_those_that_should_be(self) -> None:
        for key in KEYS:
            slot = self.slots.find(key)
            assert (slot and (slot.pages, slot.num_users)) == (
                (self.pages[key], self.users.count(key)) if key in self.pages else None
            )

    @invariant()
    def every_slot_is_active_idle_or_free(self) -> None:
        num_active = len(set(self.users))

        assert counts(self.slots) == (num_active, len(self.pages) - num_active, self.num_slots - len(self.pages))
        assert min(counts(self.slots)) >= 0

    def _can_join(self, wanted: dict[Hashable, int]) -> bool:
        """Return whether joining would go well, on a copy: loaded adapters are used, then the rest is loaded and
        used.
        """
        slots = copy.deepcopy(self.slots)
        try:
            for key in sorted(wanted, key=lambda key: key not in self.pages):
                if not slots.find(key):
                    slots.load(key, wanted[key])
                slots.acquire(key)
        except StopIteration:  # nobody is left to give way
            return False
        return True

    def _load(self, key: Hashable, num_pages: int) -> None:
        """Load, and assert that the oldest idle ones were evicted, and not one too many."""
        idle = [one for one in self.pages if one not in self.users]
        slot = self.slots.load(key, num_pages)
        gone = [one for one in self.pages if not self.slots.find(one)]
        assert len(slot.pages) == num_pages
        assert gone == idle[: len(gone)]

        last = gone[-1:]
        for one in gone:
            if one not in last:
                del self.pages[one]
        num_free_pages = self.num_pages - sum(map(len, self.pages.values()))
        assert not last or len(self.pages) == self.num_slots or num_free_pages < num_pages
        for one in last:
            del self.pages[one]
        self.pages[key] = slot.pages


AnyOrder.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestAnyOrder = AnyOrder.TestCase
