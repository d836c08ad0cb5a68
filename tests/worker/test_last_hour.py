"""The last hour's numbers: buckets of a minute, percentiles, and a size that no load changes."""

import sys

import pytest

from worker.last_hour import MAX_JOBS, MINUTES, LastHour, percentile
from worker.outcome import Outcome


class Clock:
    """A clock that is set by hand, in seconds."""

    def __init__(self) -> None:
        self.now = 6000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def hour(clock: Clock) -> LastHour:
    return LastHour(clock)


def test_empty_hour_has_one_minute_and_no_percentile(hour: LastHour) -> None:
    shown = hour.summary()

    assert (shown.complete, shown.failed, shown.seconds, shown.waiting) == ((0,), (0,), (None,), (None,))
    assert (shown.seconds_p50, shown.seconds_p95, shown.waited_p50, shown.waited_p95) == (None,) * 4
    assert shown.jobs_per_minute == 0


def test_jobs_are_counted_in_the_minute_of_their_end(hour: LastHour, clock: Clock) -> None:
    hour.add_job(Outcome.COMPLETE, 4.0, None)
    hour.add_job(Outcome.COMPLETE, 8.0, None)
    hour.add_job(Outcome.FAILED, 0.1, None)
    clock.now += 120
    hour.add_job(Outcome.COMPLETE, 5.0, None)
    hour.add_job(Outcome.CANCELLED, 1.0, None)
    hour.add_job(Outcome.RETRIED, 1.0, None)

    shown = hour.summary()

    assert (shown.complete, shown.failed) == ((2, 0, 1), (1, 0, 0))
    assert shown.seconds == (6.0, None, 5.0)


def test_rate_is_of_the_last_five_minutes_with_the_current_one_as_far_as_it_has_gone(
    hour: LastHour, clock: Clock
) -> None:
    for _ in range(90):
        hour.add_job(Outcome.COMPLETE, 1.0, None)
    clock.now += 5 * 60
    for _ in range(9):
        hour.add_job(Outcome.COMPLETE, 1.0, None)
    clock.now += 30

    assert hour.summary().jobs_per_minute == 2.0


def test_rate_of_the_first_seconds_is_not_blown_up_to_a_minute(hour: LastHour, clock: Clock) -> None:
    clock.now += 1
    hour.add_job(Outcome.COMPLETE, 1.0, None)

    assert hour.summary().jobs_per_minute == 1.0


def test_percentiles_are_of_completed_jobs_of_the_last_hour(hour: LastHour, clock: Clock) -> None:
    hour.add_job(Outcome.COMPLETE, 1000.0, 1000.0)
    clock.now += 3600
    for number in range(1, 21):
        hour.add_job(Outcome.COMPLETE, float(number), number / 10 if number > 10 else None)
        hour.add_job(Outcome.FAILED, 0.001, 0.001)

    shown = hour.summary()

    assert (shown.seconds_p50, shown.seconds_p95) == (10.0, 19.0)
    assert (shown.waited_p50, shown.waited_p95) == (1.5, 2.0)


def test_waiting_jobs_are_the_most_of_a_minute(hour: LastHour, clock: Clock) -> None:
    for depth in (3, 14, 0):
        hour.note_waiting(depth)
    clock.now += 120
    hour.note_waiting(0)

    assert hour.summary().waiting == (14, None, 0)


def test_old_minutes_are_forgotten_however_long_nothing_happens(hour: LastHour, clock: Clock) -> None:
    hour.add_job(Outcome.COMPLETE, 1.0, None)
    clock.now += 59 * 60
    assert hour.summary().complete == (1, *(0,) * 59)

    clock.now += 60
    assert hour.summary().complete == (0,) * MINUTES

    clock.now += 1_000_000
    hour.add_job(Outcome.COMPLETE, 1.0, None)
    assert hour.summary().complete == (*(0,) * 59, 1)


def test_size_is_bounded_whatever_the_load(hour: LastHour, clock: Clock) -> None:
    def held_bytes() -> int:
        parts = [*hour._completed, *hour._minutes, hour._completed, hour._minutes]
        values = [value for one in hour._completed for value in one]
        return sum(map(sys.getsizeof, [*parts, *values]))

    for number in range(5 * MAX_JOBS):
        clock.now += 1
        hour.add_job(Outcome.COMPLETE, number / 7, number / 3)
        hour.note_waiting(number)

    assert held_bytes() < 200_000
    assert hour.summary().seconds_p95 is not None


@pytest.mark.parametrize(
    ("values", "percent", "found"), [([], 50, None), ([3.0], 95, 3.0), ([1.0, 2.0], 50, 1.0), ([1.0, 2.0], 51, 2.0)]
)
def test_percentile_is_the_nearest_rank(values: list[float], percent: int, found: float | None) -> None:
    assert percentile(values, percent) == found
