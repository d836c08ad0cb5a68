"""Queues get their shares by weight, none is starved, and none is paid for time in which it had no messages."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.broker import QueueWeight
from worker.amqp.fair_share import FairShare


def served(share: FairShare, num_starts: int, *, empty: frozenset[str] = frozenset()) -> list[str]:
    """Start messages; every queue has some, but for the empty ones."""
    order = []
    for _ in range(num_starts):
        name = next(one for one in share.order() if one not in empty)
        share.charge(name)
        order.append(name)
    return order


def share_of(**weights: int) -> FairShare:
    return FairShare([QueueWeight(*pair) for pair in weights.items()])


def test_starts_are_by_weight_and_interleaved() -> None:
    assert served(share_of(express=3, ordinary=1), 8) == [
        *("express", "ordinary", "express", "express"),
        *("express", "ordinary", "express", "express"),
    ]


def test_an_empty_queue_s_share_goes_to_the_others_by_their_weights() -> None:
    order = served(share_of(express=6, plain=2, bulk=1), 90, empty=frozenset({"express"}))

    assert Counter(order) == {"plain": 60, "bulk": 30}


def test_a_queue_that_was_empty_gets_its_share_at_once_and_nothing_for_the_past() -> None:
    share = share_of(express=3, ordinary=1)
    served(share, 100, empty=frozenset({"express"}))

    order = served(share, 41)

    assert order[0] == "express"
    assert Counter(order) == {"express": 31, "ordinary": 10}
    # And the one that had everything meanwhile does not pay for it
    assert order[:5] == ["express"] * 4 + ["ordinary"]


@settings(deadline=None)
@given(
    weights=st.lists(st.integers(1, 20), min_size=2, max_size=8),
    idle=st.lists(st.sets(st.integers(0, 7)), max_size=4),
)
def test_no_queue_waits_longer_than_its_weight_says(weights: list[int], idle: list[set[int]]) -> None:
    names = [f"q{number}" for number in range(len(weights))]
    share = FairShare([QueueWeight(*pair) for pair in zip(names, weights, strict=True)])
    for numbers in idle:
        served(share, 7, empty=frozenset(names[number] for number in numbers if 0 < number < len(names)))

    num_starts = 3 * sum(weights)
    order = served(share, num_starts)

    for name, weight in zip(names, weights, strict=True):
        turns = [turn for turn, one in enumerate(order) if one == name]
        most = sum(weights) / weight + len(weights) - 1
        assert turns[0] < most
        assert all(later - earlier <= most for earlier, later in pairwise(turns))
        assert len(turns) == pytest.approx(3 * weight, abs=len(weights))
