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
    """With a and b on it, of four bytes each, used by nobody; two bytes are free."""
    made: ControlNetCache[str] = ControlNetCache(MAX_BYTES)
    for name in "ab":
        made.get_or_load(name, 4, loaded(name))
    made.begin_round()
    return made


def residents(cache: ControlNetCache[str]) -> str:
    return "".join(name for name in "abcd" if cache.find(name))


def test_what_is_there_is_not_loaded_again(cache: ControlNetCache[str]) -> None:
    assert cache.get_or_load("a", 4, fail) == "A"
    assert cache.find("a") == "A"
    assert cache.find("c") is None


def test_nobody_gives_way_while_there_is_room(cache: ControlNetCache[str]) -> None:
    assert cache.get_or_load("c", 2, loaded("c")) == "C"

    assert residents(cache) == "abc"
    assert cache.num_bytes == MAX_BYTES


def test_the_least_recently_used_gives_way(cache: ControlNetCache[str]) -> None:
    cache.acquire("a")
    cache.release("a")

    cache.get_or_load("c", 4, loaded("c"))

    assert residents(cache) == "ac"


def test_as_many_give_way_as_must(cache: ControlNetCache[str]) -> None:
    cache.get_or_load("c", 10, loaded("c"))

    assert residents(cache) == "c"


def test_one_in_use_never_gives_way_and_another_waits_for_it(cache: ControlNetCache[str]) -> None:
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


def test_nothing_is_let_go_for_one_that_finds_no_room_all_the_same(cache: ControlNetCache[str]) -> None:
    cache.acquire("b")

    assert cache.get_or_load("c", 7, fail) is None

    assert residents(cache) == "ab"


def test_who_asks_later_does_not_take_what_somebody_before_waits_for(cache: ControlNetCache[str]) -> None:
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


def test_an_older_one_takes_what_a_younger_waits_for(cache: ControlNetCache[str]) -> None:
    # Given a younger request, whose ControlNet is there and not used yet
    cache.get_or_load("c", 10, loaded("c"))

    # When an older one, only now ready to ask, asks before it
    cache.begin_round()

    assert cache.get_or_load("d", 10, loaded("d")) == "D"
    assert cache.get_or_load("c", 10, fail) is None


def test_what_is_forgotten_is_loaded_anew(cache: ControlNetCache[str]) -> None:
    cache.forget("a")

    assert cache.get_or_load("a", 4, lambda: "again") == "again"


def test_all_but_those_in_use_and_those_to_be_kept_can_be_given_up_at_once(cache: ControlNetCache[str]) -> None:
    cache.acquire("a")

    assert not cache.drop_idle(keep={"b", None})
    assert cache.drop_idle(keep={None})
    assert residents(cache) == "a"
    assert not cache.drop_idle(keep=set())
