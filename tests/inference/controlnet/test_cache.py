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
def shelf() -> ControlNetCache[str]:
    """With a and b on it, of four bytes each, used by nobody; two bytes are free."""
    made: ControlNetCache[str] = ControlNetCache(MAX_BYTES)
    for name in "ab":
        made.want(name, 4, loaded(name))
    made.begin_round()
    return made


def residents(shelf: ControlNetCache[str]) -> str:
    return "".join(name for name in "abcd" if shelf.find(name))


def test_what_is_there_is_not_loaded_again(shelf: ControlNetCache[str]) -> None:
    assert shelf.want("a", 4, fail) == "A"
    assert shelf.find("a") == "A"
    assert shelf.find("c") is None


def test_nobody_gives_way_while_there_is_room(shelf: ControlNetCache[str]) -> None:
    assert shelf.want("c", 2, loaded("c")) == "C"

    assert residents(shelf) == "abc"
    assert shelf.num_bytes == MAX_BYTES


def test_the_least_recently_used_gives_way(shelf: ControlNetCache[str]) -> None:
    shelf.acquire("a")
    shelf.release("a")

    shelf.want("c", 4, loaded("c"))

    assert residents(shelf) == "ac"


def test_as_many_give_way_as_must(shelf: ControlNetCache[str]) -> None:
    shelf.want("c", 10, loaded("c"))

    assert residents(shelf) == "c"


def test_one_in_use_never_gives_way_and_another_waits_for_it(shelf: ControlNetCache[str]) -> None:
    shelf.acquire("a")
    shelf.acquire("a")

    shelf.want("c", 4, loaded("c"))
    assert residents(shelf) == "ac"
    shelf.acquire("c")
    shelf.release("a")
    assert shelf.want("d", 4, fail) is None

    shelf.release("a")
    assert shelf.want("d", 4, loaded("d")) == "D"
    assert residents(shelf) == "cd"


def test_nothing_is_let_go_for_one_that_finds_no_room_all_the_same(shelf: ControlNetCache[str]) -> None:
    shelf.acquire("b")

    assert shelf.want("c", 7, fail) is None

    assert residents(shelf) == "ab"


def test_who_asks_later_does_not_take_what_somebody_before_waits_for(shelf: ControlNetCache[str]) -> None:
    # Given one that waits for a, and two behind it
    assert shelf.want("a", 4, fail)
    assert shelf.want("c", 4, loaded("c"))
    assert residents(shelf) == "ac"

    # Then there is nothing left to take for the last
    assert shelf.want("b", 4, fail) is None

    # When the first has gone and they ask again, the oldest of them gets its turn
    shelf.begin_round()
    assert shelf.want("c", 4, fail)
    assert shelf.want("b", 4, loaded("b"))
    assert residents(shelf) == "bc"


def test_an_older_one_takes_what_a_younger_waits_for(shelf: ControlNetCache[str]) -> None:
    # Given a younger request, whose ControlNet is there and not used yet
    shelf.want("c", 10, loaded("c"))

    # When an older one, only now ready to ask, asks before it
    shelf.begin_round()

    assert shelf.want("d", 10, loaded("d")) == "D"
    assert shelf.want("c", 10, fail) is None


def test_what_is_forgotten_is_loaded_anew(shelf: ControlNetCache[str]) -> None:
    shelf.forget("a")

    assert shelf.want("a", 4, lambda: "again") == "again"


def test_all_but_those_in_use_and_those_to_be_kept_can_be_given_up_at_once(shelf: ControlNetCache[str]) -> None:
    shelf.acquire("a")

    assert not shelf.drop_idle(keep={"b", None})
    assert shelf.drop_idle(keep={None})
    assert residents(shelf) == "a"
    assert not shelf.drop_idle(keep=set())
