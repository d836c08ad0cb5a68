"""Who is sent to the engine's process, and who is blamed when it dies."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.process.quarantine import CRASH_WEIGHT, KILL_WEIGHT, POISON_WEIGHT, Quarantine


@dataclass(eq=False)
class Request:
    """A request as the quarantine sees it; `num_steps` until it is done, or kills the process if it is poison."""

    request_id: str
    arrived_at: float = 0.0
    is_poison: bool = False
    num_steps: int = 1

    def __repr__(self) -> str:
        return self.request_id


def quarantine_of(names: str) -> tuple[Quarantine[Request], list[Request]]:
    """Build a quarantine in which one request for each letter waits, in the order of their arrival."""
    quarantine: Quarantine[Request] = Quarantine()
    requests = [Request(name, arrived_at=number) for number, name in enumerate(names)]
    for one in requests:
        quarantine.add(one)
    return quarantine, requests


def names(requests: Sequence[Request]) -> str:
    return "".join(one.request_id for one in requests)


# --- Without a crash


def test_all_waiting_requests_are_sent_at_once_the_oldest_first() -> None:
    quarantine: Quarantine[Request] = Quarantine()
    for name, arrived_at in (("c", 3.0), ("a", 1.0), ("b", 2.0), ("B", 2.0)):
        quarantine.add(Request(name, arrived_at))

    assert names(quarantine.outside) == "cabB"
    assert names(quarantine.next_to_send()) == "abBc"
    assert (names(quarantine.inside), names(quarantine.outside)) == ("abBc", "")
    assert quarantine.next_to_send() == []


def test_new_request_is_sent_beside_those_in_the_child() -> None:
    quarantine, _ = quarantine_of("ab")
    quarantine.next_to_send()

    quarantine.add(Request("c"))

    assert names(quarantine.next_to_send()) == "c"
    assert names(quarantine.inside) == "abc"


def test_only_requests_in_the_child_are_found() -> None:
    quarantine, (a, b) = quarantine_of("ab")
    assert quarantine.find("a") is None
    quarantine.next_to_send()
    quarantine.add(c := Request("c"))

    assert (quarantine.find("a"), quarantine.find("b"), quarantine.find("c")) == (a, b, None)
    quarantine.remove(a)
    quarantine.remove(c)

    assert quarantine.find("a") is None
    assert (names(quarantine.inside), names(quarantine.outside)) == ("b", "")


def test_two_requests_of_one_id_are_never_inside_together() -> None:
    quarantine: Quarantine[Request] = Quarantine()
    first, second, third = (Request("a", arrived_at) for arrived_at in (1.0, 2.0, 3.0))
    for one in (third, first, second):
        quarantine.add(one)

    assert quarantine.next_to_send() == [first]
    assert quarantine.next_to_send() == []
    quarantine.remove(third)
    assert quarantine.find("a") is first
    quarantine.remove(first)
    assert quarantine.next_to_send() == [second]


# --- Crashes


def test_crash_without_requests_makes_no_suspect() -> None:
    quarantine, _ = quarantine_of("ab")

    assert [quarantine.on_crash() for _ in range(5)] == [None] * 5

    assert names(quarantine.next_to_send()) == "ab"


def test_suspects_are_sent_one_at_a_time_the_newest_first_and_alone() -> None:
    # Given a crash under three, and a newcomer older than all of them
    quarantine, (a, b, c) = quarantine_of("abc")
    quarantine.next_to_send()
    assert quarantine.on_crash() is None
    quarantine.add(late := Request("l", arrived_at=-1.0))

    # When each that was inside is answered alone
    tried = []
    for one in (c, b, a):
        tried.append(names(quarantine.next_to_send()))
        assert quarantine.next_to_send() == []
        quarantine.remove(one)

    # Then the newcomer, and whoever comes now, goes in with others again
    assert tried == ["c", "b", "a"]
    quarantine.add(Request("m"))
    assert names(quarantine.next_to_send()) == "lm"
    assert late in quarantine.inside


def test_request_that_crashes_alone_is_retried_at_once_and_convicted_the_second_time() -> None:
    quarantine, (_, _, c) = quarantine_of("abc")
    quarantine.next_to_send()
    quarantine.on_crash()

    assert POISON_WEIGHT == 2 * CRASH_WEIGHT
    assert names(quarantine.next_to_send()) == "c"
    assert quarantine.on_crash() is None
    assert names(quarantine.next_to_send()) == "c"
    assert quarantine.on_crash() is c

    assert quarantine.find("c") is None
    assert c not in quarantine.outside


def test_kills_from_outside_count_half_a_crash() -> None:
    quarantine, (a,) = quarantine_of("a")

    for _ in range(POISON_WEIGHT // KILL_WEIGHT - 1):
        quarantine.next_to_send()
        assert quarantine.on_crash(is_killed=True) is None
    quarantine.next_to_send()

    assert quarantine.on_crash(is_killed=True) is a


def test_kill_before_two_crashes_convicts_no_sooner_than_two_crashes() -> None:
    quarantine, (a,) = quarantine_of("a")
    deaths = []

    for is_killed in (True, False, False):
        quarantine.next_to_send()
        deaths.append(quarantine.on_crash(is_killed=is_killed))

    assert deaths == [None, None, a]


def test_other_suspects_are_cleared_by_a_conviction_and_sent_together_the_oldest_first() -> None:
    quarantine, (_, _, c, d) = quarantine_of("abcd")
    quarantine.next_to_send()
    quarantine.on_crash()
    quarantine.next_to_send()
    quarantine.remove(d)
    for _ in range(2):
        assert quarantine.next_to_send() == [c]
        convicted = quarantine.on_crash()
    quarantine.add(Request("e", arrived_at=0.5))

    assert convicted is c
    assert names(quarantine.next_to_send()) == "aeb"


def test_answered_request_leaves_no_record() -> None:
    # Given a request that the process died under once, and that was answered then
    quarantine, (a,) = quarantine_of("a")
    quarantine.next_to_send()
    assert quarantine.on_crash() is None
    quarantine.next_to_send()
    quarantine.remove(a)

    # When it comes again
    quarantine.add(a)
    quarantine.next_to_send()

    # Then a death is its first
    assert quarantine.on_crash() is None


def test_request_alone_in_the_child_by_chance_is_a_suspect_and_sent_alone() -> None:
    quarantine, (a,) = quarantine_of("a")
    quarantine.next_to_send()
    quarantine.on_crash()
    quarantine.add(Request("b", arrived_at=-1.0))

    assert quarantine.next_to_send() == [a]
    assert quarantine.next_to_send() == []
    assert quarantine.on_crash() is a
    assert names(quarantine.next_to_send()) == "b"


def test_a_suspect_that_is_cancelled_is_tried_no_more() -> None:
    quarantine, (_, b, _) = quarantine_of("abc")
    quarantine.next_to_send()
    quarantine.on_crash()

    quarantine.remove(b)

    assert names(quarantine.outside) == "ca"
    assert names(quarantine.next_to_send()) == "c"
    quarantine.remove(quarantine.inside[0])
    assert names(quarantine.next_to_send()) == "a"


def test_a_second_crash_under_several_makes_suspects_of_the_rest() -> None:
    quarantine, (_, b, c) = quarantine_of("abc")
    quarantine.next_to_send()
    quarantine.on_crash()
    for _ in range(2):
        assert quarantine.next_to_send() == [c]
        quarantine.on_crash()
    assert names(quarantine.next_to_send()) == "ab"

    assert quarantine.on_crash() is None

    assert quarantine.next_to_send() == [b]
    assert quarantine.next_to_send() == []


# --- Spared


def test_request_spared_on_restart_is_no_suspect() -> None:
    quarantine, _ = quarantine_of("abc")
    quarantine.next_to_send()

    quarantine.on_restart()

    assert quarantine.inside == ()
    assert names(quarantine.next_to_send()) == "abc"


def test_a_suspect_that_is_spared_stays_one_with_the_record_it_had() -> None:
    quarantine, (_, b) = quarantine_of("ab")
    quarantine.next_to_send()
    quarantine.on_crash()
    quarantine.next_to_send()
    quarantine.on_crash()
    assert quarantine.next_to_send() == [b]

    quarantine.on_restart()

    assert quarantine.next_to_send() == [b]
    assert quarantine.next_to_send() == []
    assert quarantine.on_crash() is b
    assert names(quarantine.next_to_send()) == "a"


# --- Any course of events


REQUESTS = st.builds(
    Request,
    request_id=st.uuids().map(str),
    arrived_at=st.floats(0, 100),
    is_poison=st.booleans(),
    num_steps=st.integers(1, 6),
)


@given(st.lists(st.lists(REQUESTS, max_size=5), max_size=5))
def test_poison_alone_is_convicted_in_any_order_of_events(waves: list[list[Request]]) -> None:
    # Given waves of requests, one between any two turns, to a process that every poison kills at its last step
    quarantine: Quarantine[Request] = Quarantine()
    everyone = [one for wave in waves for one in wave]
    finished: list[Request] = []
    convicted: list[Request] = []
    steps: dict[Request, int] = {}
    num_crashes = 0

    while waves or quarantine.outside or quarantine.inside:
        for one in waves.pop(0) if waves else []:
            quarantine.add(one)
        quarantine.next_to_send()
        for one in quarantine.inside:
            steps[one] = steps.get(one, 0) + 1
        done = [one for one in quarantine.inside if steps[one] >= one.num_steps]
        if any(one.is_poison for one in done):
            num_crashes += 1
            steps.clear()
            culprit = quarantine.on_crash()
            convicted += [culprit] if culprit else []
        else:
            for one in done:
                quarantine.remove(one)
                finished.append(one)

    # Then each has the end it deserves, once, and a poison costs no more than three processes
    assert sorted(map(id, convicted)) == sorted(id(one) for one in everyone if one.is_poison)
    assert sorted(map(id, finished)) == sorted(id(one) for one in everyone if not one.is_poison)
    assert num_crashes <= 3 * len(convicted)


@given(
    st.lists(st.sampled_from(["add", "next_to_send", "answer", "cancel", "on_crash", "on_restart"]), max_size=60),
    st.randoms(),
)
def test_no_request_is_lost_or_in_two_places_and_suspects_are_sent_alone(events: list[str], random: Random) -> None:
    quarantine: Quarantine[Request] = Quarantine()
    here: list[Request] = []
    suspects: set[Request] = set()

    for number, event in enumerate(events):
        match event:
            case "add":
                here.append(one := Request(str(number), arrived_at=random.random()))
                quarantine.add(one)
            case "next_to_send":
                quarantine.next_to_send()
            case "answer" | "cancel":
                place = quarantine.inside if event == "answer" else quarantine.outside
                if place:
                    gone = random.choice(place)
                    quarantine.remove(gone)
                    here.remove(gone)
                    suspects.discard(gone)
            case "on_crash":
                victims = set(quarantine.inside)
                culprit = quarantine.on_crash()
                suspects |= victims
                if culprit is not None:
                    assert victims == {culprit}
                    here.remove(culprit)
                    suspects.clear()
            case "on_restart":
                quarantine.on_restart()

        assert sorted(map(id, here)) == sorted(map(id, (*quarantine.inside, *quarantine.outside)))
        if suspects & set(quarantine.inside):
            assert len(quarantine.inside) == 1
        if suspects and event == "next_to_send":
            assert set(quarantine.inside) <= suspects


@pytest.mark.parametrize("place", range(10))
def test_poison_costs_three_processes_at_any_position(place: int) -> None:
    quarantine, requests = quarantine_of("abcdefghij")
    poison = requests[place]
    num_crashes = 0
    convicted = None

    while convicted is None:
        quarantine.next_to_send()
        if poison in quarantine.inside:
            num_crashes += 1
            convicted = quarantine.on_crash()
        else:
            for one in quarantine.inside:
                quarantine.remove(one)

    assert (convicted, num_crashes) == (poison, 3)
    # The older ones were never tried alone
    assert quarantine.next_to_send() == requests[:place]
