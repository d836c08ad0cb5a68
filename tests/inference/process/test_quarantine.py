"""Who is sent to the engine's process, and who is blamed when it dies."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.process.quarantine import CONVICTING_WEIGHT, DEATH_WEIGHT, KILL_WEIGHT, ChildQuarantine


@dataclass(eq=False)
class Asked:
    """A request as the lineup sees it; `num_steps` until it is done, or kills the process if it is poison."""

    request_id: str
    arrived_at: float = 0.0
    is_poison: bool = False
    num_steps: int = 1

    def __repr__(self) -> str:
        return self.request_id


def lineup_of(names: str) -> tuple[ChildQuarantine[Asked], list[Asked]]:
    """A lineup in which one request for each letter waits, in the order of their arrival."""
    lineup: ChildQuarantine[Asked] = ChildQuarantine()
    asked = [Asked(name, arrived_at=number) for number, name in enumerate(names)]
    for one in asked:
        lineup.add(one)
    return lineup, asked


def names(requests: Sequence[Asked]) -> str:
    return "".join(one.request_id for one in requests)


# --- Without a crash


def test_all_that_wait_go_inside_at_once_the_oldest_first() -> None:
    lineup: ChildQuarantine[Asked] = ChildQuarantine()
    for name, arrived_at in (("c", 3.0), ("a", 1.0), ("b", 2.0), ("B", 2.0)):
        lineup.add(Asked(name, arrived_at))

    assert names(lineup.outside) == "cabB"
    assert names(lineup.take()) == "abBc"
    assert (names(lineup.inside), names(lineup.outside)) == ("abBc", "")
    assert lineup.take() == []


def test_a_newcomer_goes_inside_beside_those_that_are_there() -> None:
    lineup, _ = lineup_of("ab")
    lineup.take()

    lineup.add(Asked("c"))

    assert names(lineup.take()) == "c"
    assert names(lineup.inside) == "abc"


def test_only_what_is_inside_is_found_and_what_is_answered_is_nowhere() -> None:
    lineup, (a, b) = lineup_of("ab")
    assert lineup.find("a") is None
    lineup.take()
    lineup.add(c := Asked("c"))

    assert (lineup.find("a"), lineup.find("b"), lineup.find("c")) == (a, b, None)
    lineup.remove(a)
    lineup.remove(c)

    assert lineup.find("a") is None
    assert (names(lineup.inside), names(lineup.outside)) == ("b", "")


def test_two_requests_of_one_id_are_never_inside_together() -> None:
    lineup: ChildQuarantine[Asked] = ChildQuarantine()
    first, second, third = (Asked("a", arrived_at) for arrived_at in (1.0, 2.0, 3.0))
    for one in (third, first, second):
        lineup.add(one)

    assert lineup.take() == [first]
    assert lineup.take() == []
    lineup.remove(third)
    assert lineup.find("a") is first
    lineup.remove(first)
    assert lineup.take() == [second]


# --- Crashes


def test_a_crash_with_nothing_inside_blames_nobody() -> None:
    lineup, _ = lineup_of("ab")

    assert [lineup.blame() for _ in range(5)] == [None] * 5

    assert names(lineup.take()) == "ab"


def test_suspects_are_tried_one_at_a_time_the_newest_first_and_nothing_goes_in_beside_them() -> None:
    # Given a crash under three, and a newcomer older than all of them
    lineup, (a, b, c) = lineup_of("abc")
    lineup.take()
    assert lineup.blame() is None
    lineup.add(late := Asked("l", arrived_at=-1.0))

    # When each that was inside is answered alone
    tried = []
    for one in (c, b, a):
        tried.append(names(lineup.take()))
        assert lineup.take() == []
        lineup.remove(one)

    # Then the newcomer, and whoever comes now, goes in with others again
    assert tried == ["c", "b", "a"]
    lineup.add(Asked("m"))
    assert names(lineup.take()) == "lm"
    assert late in lineup.inside


def test_who_crashes_alone_is_tried_again_at_once_and_convicted_by_the_second_time() -> None:
    lineup, (_, _, c) = lineup_of("abc")
    lineup.take()
    lineup.blame()

    assert CONVICTING_WEIGHT == 2 * DEATH_WEIGHT
    assert names(lineup.take()) == "c"
    assert lineup.blame() is None
    assert names(lineup.take()) == "c"
    assert lineup.blame() is c

    assert lineup.find("c") is None
    assert c not in lineup.outside


def test_kills_from_outside_weigh_half_of_a_death() -> None:
    lineup, (a,) = lineup_of("a")

    for _ in range(CONVICTING_WEIGHT // KILL_WEIGHT - 1):
        lineup.take()
        assert lineup.blame(is_killed=True) is None
    lineup.take()

    assert lineup.blame(is_killed=True) is a


def test_a_kill_and_then_two_deaths_convict_no_sooner_than_two_deaths() -> None:
    lineup, (a,) = lineup_of("a")
    deaths = []

    for is_killed in (True, False, False):
        lineup.take()
        deaths.append(lineup.blame(is_killed=is_killed))

    assert deaths == [None, None, a]


def test_after_a_conviction_the_others_are_innocent_and_go_in_together_the_oldest_first() -> None:
    lineup, (_, _, c, d) = lineup_of("abcd")
    lineup.take()
    lineup.blame()
    lineup.take()
    lineup.remove(d)
    for _ in range(2):
        assert lineup.take() == [c]
        convicted = lineup.blame()
    lineup.add(Asked("e", arrived_at=0.5))

    assert convicted is c
    assert names(lineup.take()) == "aeb"


def test_who_was_answered_leaves_no_record_behind() -> None:
    # Given a request that the process died under once, and that was answered then
    lineup, (a,) = lineup_of("a")
    lineup.take()
    assert lineup.blame() is None
    lineup.take()
    lineup.remove(a)

    # When it comes again
    lineup.add(a)
    lineup.take()

    # Then a death is its first
    assert lineup.blame() is None


def test_one_that_was_inside_by_chance_alone_is_a_suspect_too_and_does_not_take_others_down() -> None:
    lineup, (a,) = lineup_of("a")
    lineup.take()
    lineup.blame()
    lineup.add(Asked("b", arrived_at=-1.0))

    assert lineup.take() == [a]
    assert lineup.take() == []
    assert lineup.blame() is a
    assert names(lineup.take()) == "b"


def test_a_suspect_that_is_cancelled_is_tried_no_more() -> None:
    lineup, (_, b, _) = lineup_of("abc")
    lineup.take()
    lineup.blame()

    lineup.remove(b)

    assert names(lineup.outside) == "ca"
    assert names(lineup.take()) == "c"
    lineup.remove(lineup.inside[0])
    assert names(lineup.take()) == "a"


def test_a_second_crash_under_several_makes_suspects_of_the_rest() -> None:
    lineup, (_, b, c) = lineup_of("abc")
    lineup.take()
    lineup.blame()
    for _ in range(2):
        assert lineup.take() == [c]
        lineup.blame()
    assert names(lineup.take()) == "ab"

    assert lineup.blame() is None

    assert lineup.take() == [b]
    assert lineup.take() == []


# --- Spared


def test_who_is_spared_is_no_suspect() -> None:
    lineup, _ = lineup_of("abc")
    lineup.take()

    lineup.spare()

    assert lineup.inside == ()
    assert names(lineup.take()) == "abc"


def test_a_suspect_that_is_spared_stays_one_with_the_record_it_had() -> None:
    lineup, (_, b) = lineup_of("ab")
    lineup.take()
    lineup.blame()
    lineup.take()
    lineup.blame()
    assert lineup.take() == [b]

    lineup.spare()

    assert lineup.take() == [b]
    assert lineup.take() == []
    assert lineup.blame() is b
    assert names(lineup.take()) == "a"


# --- Any course of events


REQUESTS = st.builds(
    Asked,
    request_id=st.uuids().map(str),
    arrived_at=st.floats(0, 100),
    is_poison=st.booleans(),
    num_steps=st.integers(1, 6),
)


@given(st.lists(st.lists(REQUESTS, max_size=5), max_size=5))
def test_whatever_comes_poison_alone_is_convicted_and_all_else_is_drawn(waves: list[list[Asked]]) -> None:
    # Given waves of requests, one between any two turns, to a process that every poison kills at its last step
    lineup: ChildQuarantine[Asked] = ChildQuarantine()
    everyone = [one for wave in waves for one in wave]
    finished: list[Asked] = []
    convicted: list[Asked] = []
    steps: dict[Asked, int] = {}
    num_crashes = 0

    while waves or lineup.outside or lineup.inside:
        for one in waves.pop(0) if waves else []:
            lineup.add(one)
        lineup.take()
        for one in lineup.inside:
            steps[one] = steps.get(one, 0) + 1
        done = [one for one in lineup.inside if steps[one] >= one.num_steps]
        if any(one.is_poison for one in done):
            num_crashes += 1
            steps.clear()
            culprit = lineup.blame()
            convicted += [culprit] if culprit else []
        else:
            for one in done:
                lineup.remove(one)
                finished.append(one)

    # Then each has the end it deserves, once, and a poison costs no more than three processes
    assert sorted(map(id, convicted)) == sorted(id(one) for one in everyone if one.is_poison)
    assert sorted(map(id, finished)) == sorted(id(one) for one in everyone if not one.is_poison)
    assert num_crashes <= 3 * len(convicted)


@given(st.lists(st.sampled_from(["add", "take", "answer", "cancel", "blame", "spare"]), max_size=60), st.randoms())
def test_nobody_is_lost_or_in_two_places_and_suspects_are_inside_alone(events: list[str], random: Random) -> None:
    lineup: ChildQuarantine[Asked] = ChildQuarantine()
    here: list[Asked] = []
    suspects: set[Asked] = set()

    for number, event in enumerate(events):
        match event:
            case "add":
                here.append(one := Asked(str(number), arrived_at=random.random()))
                lineup.add(one)
            case "take":
                lineup.take()
            case "answer" | "cancel":
                place = lineup.inside if event == "answer" else lineup.outside
                if place:
                    gone = random.choice(place)
                    lineup.remove(gone)
                    here.remove(gone)
                    suspects.discard(gone)
            case "blame":
                victims = set(lineup.inside)
                culprit = lineup.blame()
                suspects |= victims
                if culprit is not None:
                    assert victims == {culprit}
                    here.remove(culprit)
                    suspects.clear()
            case "spare":
                lineup.spare()

        assert sorted(map(id, here)) == sorted(map(id, (*lineup.inside, *lineup.outside)))
        if suspects & set(lineup.inside):
            assert len(lineup.inside) == 1
        if suspects and event == "take":
            assert set(lineup.inside) <= suspects


@pytest.mark.parametrize("place", range(10))
def test_wherever_the_poison_stands_it_costs_three_processes(place: int) -> None:
    lineup, asked = lineup_of("abcdefghij")
    poison = asked[place]
    num_crashes = 0
    convicted = None

    while convicted is None:
        lineup.take()
        if poison in lineup.inside:
            num_crashes += 1
            convicted = lineup.blame()
        else:
            for one in lineup.inside:
                lineup.remove(one)

    assert (convicted, num_crashes) == (poison, 3)
    # The older ones were never tried alone
    assert lineup.take() == asked[:place]
