"""Which ControlNets stay on the device and which give way, decided without any."""

from collections.abc import Callable

import pytest

from inference.controlnet.cache import ControlNetCache

MAX_BYTES = 10


def fail() -> str:
    pytest.fail("nothing was to be loaded")


def loaded(name: str) -> Callable[[], str]:
    return name.upper


@pytest.fixture
def cache() -> ControlNetCache[str]:
    """Make a cache with a and b in it, of four bytes each, both unused; two bytes are free."""
    made: ControlNetCache[str] = ControlNetCache(MAX_BYTES)
    for name in "ab":
        made.get_or_load(name, 4, loaded(name))
    made.begin_round()
    return made


def residents(cache: ControlNetCache[str]) -> str:
    return "".join(name for name in "abcd" if cache.find(name))


def test_loaded_controlnet_is_not_loaded_again(cache: ControlNetCache[str]) -> None:
    assert cache.get_or_load("a", 4, fail) == "A"
    assert cache.find("a") == "A"
    assert cache.find("c") is None


def test_nothing_is_evicted_while_there_is_room(cache: ControlNetCache[str]) -> None:
    assert cache.get_or_load("c", 2, loaded("c")) == "C"

    assert residents(cache) == "abc"
    assert cache.num_bytes == MAX_BYTES


def test_least_recently_used_is_evicted(cache: ControlNetCache[str]) -> None:
    cache.acquire("a")
    cache.release("a")

    cache.get_or_load("c", 4, loaded("c"))

    assert residents(cache) == "ac"


def test_as_many_are_evicted_as_needed(cache: ControlNetCache[str]) -> None:
    cache.get_or_load("c", 10, loaded("c"))

    assert residents(cache) == "c"


def test_controlnet_in_use_is_never_evicted_and_another_waits_for_it(cache: ControlNetCache[str]) -> None:
    cache.acquire("a")
    cache.acquire("a")

    cache.get_or_load("c", 4, loaded("c"))
    assert residents(cache) == "ac"
    cache.acquire("c")
    cache.release("a")
    assert cache.get_or_load("d", 4, fail) is None

    cache.release("a")
    assert cache.get_or_load("d", 4, loaded("d")) == "D"
    assert residents(cache) == "cd"


def test_nothing_is_evicted_for_a_controlnet_that_would_not_fit_anyway(cache: ControlNetCache[str]) -> None:
    cache.acquire("b")

    assert cache.get_or_load("c", 7, fail) is None

    assert residents(cache) == "ab"


def test_later_request_does_not_take_memory_reserved_for_an_earlier_one(cache: ControlNetCache[str]) -> None:
    # Given one that waits for a, and two behind it
    assert cache.get_or_load("a", 4, fail)
    assert cache.get_or_load("c", 4, loaded("c"))
    assert residents(cache) == "ac"

    # Then there is nothing left to take for the last
    assert cache.get_or_load("b", 4, fail) is None

    # When the first has gone and they ask again, the oldest of them gets its turn
    cache.begin_round()
    assert cache.get_or_load("c", 4, fail)
    assert cache.get_or_load("b", 4, loaded("b"))
    assert residents(cache) == "bc"


def test_older_request_takes_memory_reserved_for_a_younger_one(cache: ControlNetCache[str]) -> None:
    # Given a younger request, whose ControlNet is there and not used yet
    cache.get_or_load("c", 10, loaded("c"))

    # When an older one, only now ready to ask, asks before it
    cache.begin_round()

    assert cache.get_or_load("d", 10, loaded("d")) == "D"
    assert cache.get_or_load("c", 10, fail) is None


def test_forgotten_controlnet_is_loaded_again(cache: ControlNetCache[str]) -> None:
    cache.forget("a")

    assert cache.get_or_load("a", 4, lambda: "again") == "again"


def test_all_but_used_and_kept_controlnets_are_evicted_at_once(cache: ControlNetCache[str]) -> None:
    cache.acquire("a")

    assert not cache.drop_idle(keep={"b", None})
    assert cache.drop_idle(keep={None})
    assert residents(cache) == "a"
    assert not cache.drop_idle(keep=set())
