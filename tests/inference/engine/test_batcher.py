"""Which lanes join and which share a forward: decided without a GPU, a clock or a thread."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from inference.engine.batcher import FORWARDS_UNTIL_RELAXED, Batcher, Claim

SHAPES = ("512x512", "768x512", "1024x1024")
PLENTY = 1000


@dataclass(eq=False)
class Lane:
    """A picture without the picture. Two lanes are never the same one, as in the engine."""

    shape: str = SHAPES[0]
    num_rows: int = 2
    arrived_at: float = 0.0
    num_steps_left: int = 1


def plenty(shape: object) -> int:
    return PLENTY


def granted(lane: Lane) -> Claim:
    return Claim.GRANTED


def batcher_of(*lanes: Lane, max_lanes: int = 8, max_rows: int = PLENTY) -> Batcher[Lane]:
    """Build a batcher with these lanes active, as many as may be."""
    batcher = Batcher[Lane](max_lanes, lambda shape: max_rows)
    for lane in lanes:
        batcher.add(lane)
    batcher.admit(granted)
    return batcher


def lanes_by_age(num_lanes: int) -> list[Lane]:
    return [Lane(arrived_at=float(number)) for number in range(num_lanes)]


def num_rows_of(lanes: Iterable[Lane]) -> int:
    return sum(lane.num_rows for lane in lanes)


def age(lane: Lane) -> float:
    return lane.arrived_at


# --- Joining


def test_a_batcher_without_lanes_has_no_batch() -> None:
    assert Batcher[Lane](4, plenty).next_batch() == []


def test_a_lane_that_waits_is_in_no_batch() -> None:
    batcher = Batcher[Lane](4, plenty)

    batcher.add(Lane())

    assert batcher.next_batch() == []


def test_a_lane_joins_at_the_very_next_batch() -> None:
    # Given a lane under way
    first, second = lanes_by_age(2)
    batcher = batcher_of(first)
    assert batcher.next_batch() == [first]

    # When another comes between two forwards
    batcher.add(second)
    assert batcher.admit(granted) == [second]

    # Then the two share the next one
    assert batcher.next_batch() == [first, second]


@given(st.permutations(range(6)))
def test_the_oldest_join_first_in_whatever_order_they_were_added(order: list[int]) -> None:
    lanes = lanes_by_age(6)
    batcher = Batcher[Lane](4, plenty)
    for number in order:
        batcher.add(lanes[number])

    assert batcher.admit(granted) == lanes[:4]
    assert batcher.waiting == tuple(lanes[4:])


def test_lanes_of_one_moment_keep_the_order_they_were_added_in() -> None:
    lanes = [Lane(arrived_at=1.0) for _ in range(5)]

    assert batcher_of(*lanes, max_lanes=3).next_batch() == lanes[:3]


def test_full_batcher_calls_no_admission() -> None:
    batcher = batcher_of(*lanes_by_age(3), max_lanes=2)
    asked: list[Lane] = []

    def claim(lane: Lane) -> Claim:
        asked.append(lane)
        return Claim.GRANTED

    # A claim that is granted takes a slot: it must not be asked for a lane that cannot join.
    assert batcher.admit(claim) == []
    assert asked == []


@pytest.mark.parametrize(
    ("answer", "joined", "waiting"),
    [
        (Claim.GRANTED, [0, 1, 2], []),
        (Claim.NOT_YET, [0, 2], [1]),
        (Claim.NO_SLOT, [0], [1, 2]),
        (Claim.WITHDRAWN, [0, 2], []),
    ],
)
def test_admission_decides_which_lanes_join_and_which_wait(
    answer: Claim, joined: list[int], waiting: list[int]
) -> None:
    lanes = lanes_by_age(3)
    batcher = Batcher[Lane](8, plenty)
    for lane in lanes:
        batcher.add(lane)

    found = batcher.admit(lambda lane: answer if lane is lanes[1] else Claim.GRANTED)

    assert found == [lanes[number] for number in joined]
    assert batcher.active == tuple(found)
    assert batcher.waiting == tuple(lanes[number] for number in waiting)


def test_lane_passed_over_is_admitted_first_the_next_time() -> None:
    # Given a lane whose adapters took long, and a younger one that went ahead
    slow, quick, latest = lanes_by_age(3)
    batcher = Batcher[Lane](2, plenty)
    batcher.add(slow)
    batcher.add(quick)
    assert batcher.admit(lambda lane: Claim.NOT_YET if lane is slow else Claim.GRANTED) == [quick]

    # When there is one place for two
    batcher.add(latest)
    joined = batcher.admit(granted)

    # Then age decides, in the batch as well
    assert joined == [slow]
    assert batcher.next_batch() == [slow, quick]


# --- Memory that something beside the forwards needs


def test_making_room_halves_the_forwards_of_every_active_shape_each_time_and_never_raises_a_cap() -> None:
    lanes = [Lane(shape, arrived_at=float(age)) for age in range(8) for shape in SHAPES[:2]]
    batcher = batcher_of(*lanes, max_lanes=16)
    sizes = []

    for _ in range(5):
        sizes.append([len(batcher.next_batch()) for _ in range(2)])
        batcher.make_room()

    assert sizes == [[8, 8], [4, 4], [2, 2], [1, 1], [1, 1]]


# --- Leaving


def test_a_place_that_a_lane_leaves_is_taken_by_the_next() -> None:
    lanes = lanes_by_age(3)
    batcher = batcher_of(*lanes, max_lanes=2)

    batcher.remove(lanes[0])

    assert batcher.admit(granted) == [lanes[2]]
    assert batcher.next_batch() == lanes[1:]


@pytest.mark.parametrize("number", range(4))
def test_a_lane_can_be_taken_out_waiting_or_active(number: int) -> None:
    lanes = lanes_by_age(4)
    batcher = batcher_of(*lanes, max_lanes=2)

    batcher.remove(lanes[number])

    assert lanes[number] not in batcher.active + batcher.waiting
    assert set(batcher.active + batcher.waiting) == {*lanes} - {lanes[number]}


# --- Sharing a forward


def test_a_batch_takes_the_oldest_that_fit() -> None:
    lanes = lanes_by_age(4)

    assert batcher_of(*lanes, max_rows=5).next_batch() == lanes[:2]


def test_a_small_young_lane_does_not_slip_past_one_that_does_not_fit() -> None:
    old, large, small = (
        Lane(arrived_at=number, num_rows=num_rows) for number, num_rows in [(0.0, 2), (1.0, 2), (2.0, 1)]
    )

    assert batcher_of(old, large, small, max_rows=3).next_batch() == [old]


@pytest.mark.parametrize("max_rows", [-1, 0, 1])
def test_one_lane_is_tried_even_where_none_seems_to_fit(max_rows: int) -> None:
    lanes = lanes_by_age(2)

    assert batcher_of(*lanes, max_rows=max_rows).next_batch() == lanes[:1]


def test_memory_limit_is_queried_for_the_shape_before_each_forward() -> None:
    small = [Lane("small", arrived_at=float(number)) for number in range(3)]
    large = [Lane("large", arrived_at=float(number)) for number in range(3)]
    max_rows = {"small": 6, "large": 2}
    batcher = Batcher[Lane](8, lambda shape: max_rows[str(shape)])
    for lane in small + large:
        batcher.add(lane)
    batcher.admit(granted)

    assert {tuple(batcher.next_batch()), tuple(batcher.next_batch())} == {tuple(small), tuple(large[:1])}

    max_rows["large"] = 4
    assert {tuple(batcher.next_batch()), tuple(batcher.next_batch())} == {tuple(small), tuple(large[:2])}


@given(
    shapes=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=8),
    num_turns_before=st.integers(0, 10),
    max_rows=st.integers(0, 16),
)
def test_shapes_take_turns(shapes: list[str], num_turns_before: int, max_rows: int) -> None:
    batcher = batcher_of(*(Lane(shape) for shape in shapes), max_rows=max_rows)
    for _ in range(num_turns_before):
        batcher.next_batch()

    # Among any k shapes each has exactly one of any k turns.
    turns = [batcher.next_batch()[0].shape for _ in set(shapes)]

    assert sorted(turns) == sorted(set(shapes))


def test_a_shape_that_ends_does_not_give_the_first_one_a_second_turn() -> None:
    lanes = [Lane(shape, arrived_at=float(number)) for number, shape in enumerate("abc")]
    batcher = batcher_of(*lanes)
    assert [batcher.next_batch(), batcher.next_batch()] == [[lanes[0]], [lanes[1]]]

    batcher.remove(lanes[1])

    assert batcher.next_batch() == [lanes[2]]


def test_a_shape_whose_oldest_lane_ends_does_not_jump_over_the_others() -> None:
    lanes = [Lane(shape, arrived_at=float(number)) for number, shape in enumerate("caea")]
    batcher = batcher_of(*lanes, max_rows=2)
    assert [batcher.next_batch(), batcher.next_batch()] == [[lanes[0]], [lanes[1]]]

    batcher.remove(lanes[1])

    assert batcher.next_batch() == [lanes[2]]


# --- Out of memory


def test_batch_that_does_not_fit_is_halved_down_to_one_lane_and_then_given_up() -> None:
    lanes = lanes_by_age(5)
    batcher = batcher_of(*lanes)

    halves = list(itertools.accumulate(range(3), lambda batch, _: batcher.halve(batch), initial=batcher.next_batch()))

    assert halves == [lanes, lanes[:2], lanes[:1], []]


def test_batch_that_fitted_after_a_shortage_becomes_the_cap() -> None:
    lanes = lanes_by_age(6)
    batcher = batcher_of(*lanes)

    half = batcher.halve(batcher.next_batch())

    assert batcher.next_batch() == half == lanes[:3]


def test_a_shortage_of_one_shape_leaves_the_others_as_they_were() -> None:
    large = [Lane("large", arrived_at=float(number)) for number in range(4)]
    small = [Lane("small", arrived_at=float(number)) for number in range(4, 8)]
    batcher = batcher_of(*large, *small)

    batcher.halve(batcher.next_batch())

    assert [batcher.next_batch(), batcher.next_batch()] == [small, large[:2]]


def test_shortage_of_one_lane_limits_no_other_shape() -> None:
    lanes = lanes_by_age(3)
    batcher = batcher_of(lanes[0])
    assert batcher.halve(batcher.next_batch()) == []
    batcher.remove(lanes[0])

    batcher.add(lanes[1])
    batcher.add(lanes[2])
    batcher.admit(granted)

    assert batcher.next_batch() == lanes[1:]


def forwards(batcher: Batcher[Lane], num_forwards: int) -> list[int]:
    """Return the sizes of this many batches that all went well."""
    sizes = []
    for _ in range(num_forwards):
        batch = batcher.next_batch()
        batcher.note_success(batch)
        sizes.append(len(batch))
    return sizes


def test_a_cap_is_raised_by_one_lane_at_a_time_until_it_is_forgotten() -> None:
    batcher = batcher_of(*lanes_by_age(4), max_lanes=4)
    batcher.halve(batcher.next_batch())

    sizes = forwards(batcher, 3 * FORWARDS_UNTIL_RELAXED)

    assert sizes == [size for size in (2, 3, 4) for _ in range(FORWARDS_UNTIL_RELAXED)]


def test_a_shortage_starts_the_count_of_good_forwards_anew() -> None:
    # Given a cap that was to be raised at the next success
    batcher = batcher_of(*lanes_by_age(8))
    batcher.halve(batcher.next_batch())
    assert forwards(batcher, FORWARDS_UNTIL_RELAXED - 1)[-1] == 4

    # When memory runs short once more
    batcher.halve(batcher.next_batch())

    # Then the patience is the whole of it again
    assert set(forwards(batcher, FORWARDS_UNTIL_RELAXED)) == {2}
    assert forwards(batcher, 1) == [3]


def test_a_cap_that_was_forgotten_can_come_back() -> None:
    batcher = batcher_of(*lanes_by_age(4), max_lanes=4)
    batcher.halve(batcher.next_batch())
    assert forwards(batcher, 2 * FORWARDS_UNTIL_RELAXED + 1)[-1] == 4

    batcher.halve(batcher.next_batch())

    assert forwards(batcher, FORWARDS_UNTIL_RELAXED + 1) == [2] * FORWARDS_UNTIL_RELAXED + [3]


def test_a_raised_cap_does_not_outdo_the_memory_that_is_free() -> None:
    batcher = batcher_of(*lanes_by_age(4), max_lanes=4, max_rows=4)
    batcher.halve(batcher.next_batch())

    sizes = forwards(batcher, 4 * FORWARDS_UNTIL_RELAXED)

    assert (sizes[0], sizes[-1], max(sizes)) == (1, 2, 2)


# --- In any order


class AnyOrder(RuleBasedStateMachine):
    """Lanes come, join, share forwards, run out of memory and leave, in any order."""

    @initialize(max_lanes=st.integers(1, 5), max_rows=st.tuples(*[st.integers(0, 12)] * len(SHAPES)))
    def begin(self, max_lanes: int, max_rows: tuple[int, ...]) -> None:
        self.max_lanes = max_lanes
        self.max_rows: dict[object, int] = dict(zip(SHAPES, max_rows, strict=True))
        self.batcher = Batcher[Lane](max_lanes, self.max_rows.__getitem__)
        # For each active shape, which others had a turn since it had one or became active.
        self.turns_since: dict[str, set[str]] = {}

    @rule(shape=st.sampled_from(SHAPES), num_rows=st.integers(1, 2), arrived_at=st.integers(0, 20))
    def add(self, shape: str, num_rows: int, arrived_at: int) -> None:
        lane = Lane(shape, num_rows, float(arrived_at))
        self.batcher.add(lane)

        assert lane in self.batcher.waiting

    @rule(answers=st.lists(st.sampled_from(Claim), max_size=8))
    def admit(self, answers: list[Claim]) -> None:
        waiting, num_free = self.batcher.waiting, self.max_lanes - len(self.batcher.active)
        claims: dict[Lane, Claim] = {}

        def claim(lane: Lane) -> Claim:
            claims[lane] = answers[len(claims)] if len(claims) < len(answers) else Claim.GRANTED
            return claims[lane]

        joined = self.batcher.admit(claim)

        assert list(claims) == list(waiting[: len(claims)])
        assert joined == [lane for lane, answer in claims.items() if answer is Claim.GRANTED]
        assert Claim.NO_SLOT not in list(claims.values())[:-1]
        assert len(claims) == len(waiting) or len(joined) == num_free or [*claims.values()][-1] is Claim.NO_SLOT
        left = {lane for lane, answer in claims.items() if answer in (Claim.GRANTED, Claim.WITHDRAWN)}
        assert self.batcher.waiting == tuple(lane for lane in waiting if lane not in left)

    @rule(ends=st.lists(st.booleans(), max_size=5), fits=st.booleans())
    def forward(self, ends: list[bool], fits: bool) -> None:
        active = self.batcher.active
        batch = self.batcher.next_batch()
        assert bool(batch) == bool(active)
        if not batch:
            return

        self._check(batch, active)
        if not fits:
            half = self.batcher.halve(batch)
            assert half == batch[: len(batch) // 2]
            if half:
                self.max_rows[half[0].shape] = min(self.max_rows[half[0].shape], num_rows_of(half))
            batch = half
        if batch:
            self.batcher.note_success(batch)
        for lane, is_done in zip(batch, ends, strict=False):
            if is_done:
                self.batcher.remove(lane)

    def _check(self, batch: list[Lane], active: tuple[Lane, ...]) -> None:
        (shape,) = {lane.shape for lane in batch}
        of_shape = sorted((lane for lane in active if lane.shape == shape), key=age)
        max_rows = self.max_rows[shape]

        assert batch == of_shape[: len(batch)]
        assert num_rows_of(batch) <= max_rows or len(batch) == 1
        assert batch == of_shape or num_rows_of(of_shape[: len(batch) + 1]) > max_rows
        for other, turns in self.turns_since.items():
            assert other == shape or shape not in turns
            turns.add(shape)
        self.turns_since[shape].clear()

    @precondition(lambda self: self.batcher.active or self.batcher.waiting)
    @rule(number=st.integers(0, 20))
    def cancel(self, number: int) -> None:
        lanes = self.batcher.active + self.batcher.waiting
        lane = lanes[number % len(lanes)]
        self.batcher.remove(lane)

        assert set(self.batcher.active + self.batcher.waiting) == {*lanes} - {lane}

    @invariant()
    def lanes_are_bounded_and_in_order(self) -> None:
        assert len(self.batcher.active) <= self.max_lanes
        assert list(self.batcher.waiting) == sorted(self.batcher.waiting, key=age)
        assert not set(self.batcher.active) & set(self.batcher.waiting)

        shapes = {lane.shape for lane in self.batcher.active}
        self.turns_since = {shape: self.turns_since.get(shape, set()) for shape in shapes}


AnyOrder.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestAnyOrder = AnyOrder.TestCase


def run_step(batcher: Batcher[Lane], claim: Callable[[Lane], Claim]) -> None:
    """Do what the engine does from one boundary to the next."""
    batcher.admit(claim)
    for lane in batcher.next_batch():
        lane.num_steps_left -= 1
        if not lane.num_steps_left:
            batcher.remove(lane)


NUM_WATCHED = 6
LATE_TURNS = 5
MAX_STEPS = 4


@settings(max_examples=100, deadline=None)
@given(
    kinds=st.lists(
        st.tuples(st.sampled_from(SHAPES), st.integers(1, 2), st.integers(1, MAX_STEPS)), min_size=1, max_size=8
    ),
    num_a_turn=st.integers(1, 3),
    max_lanes=st.integers(1, 4),
    max_rows=st.integers(0, 5),
    late=st.sets(st.integers(0, NUM_WATCHED - 1)),
)
def test_every_lane_ends_however_many_come_behind_it(
    kinds: list[tuple[str, int, int]], num_a_turn: int, max_lanes: int, max_rows: int, late: set[int]
) -> None:
    # Given an endless stream of lanes, and some at its head whose adapters come late
    stream = (
        Lane(shape, num_rows, float(number), num_steps)
        for number, (shape, num_rows, num_steps) in enumerate(itertools.cycle(kinds))
    )
    watched = list(itertools.islice(stream, NUM_WATCHED))
    batcher = Batcher[Lane](max_lanes, lambda shape: max_rows)
    for lane in watched:
        batcher.add(lane)
    slow = {watched[number] for number in late}

    def claim(lane: Lane) -> Claim:
        return Claim.NOT_YET if lane in slow else Claim.GRANTED

    # When as many turns have passed as it takes at the very worst: a lane at a time, and one turn in so many shapes
    for turn in range(LATE_TURNS + (NUM_WATCHED + max_lanes) * MAX_STEPS * len(SHAPES)):
        for lane in itertools.islice(stream, num_a_turn):
            batcher.add(lane)
        if turn == LATE_TURNS:
            slow.clear()
        run_step(batcher, claim)

    # Then the first have ended
    assert [lane.num_steps_left for lane in watched] == [0] * NUM_WATCHED
