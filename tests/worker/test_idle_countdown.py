"""The countdown of `--exit-when-idle`: what begins it anew, what holds it up, and when it is over."""

from typing import Any

import pytest

from worker.idle_countdown import IdleCountdown

IDLE = {"is_consuming": True, "is_at_work": False, "has_tasks": False, "num_taken": 0}


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def countdown(clock: Clock) -> IdleCountdown:
    return IdleCountdown(60, clock)


def at(countdown: IdleCountdown, clock: Clock, seconds: float, **state: Any) -> bool:
    """Tick `seconds` after the clock's start."""
    clock.now = 100.0 + seconds
    return countdown.is_over(**IDLE | state)


def test_countdown_is_over_after_its_seconds_of_consuming_nothing(countdown: IdleCountdown, clock: Clock) -> None:
    assert [at(countdown, clock, seconds) for seconds in (0, 59.9, 60)] == [False, False, True]


@pytest.mark.parametrize("state", [{"is_consuming": False}, {"is_at_work": True}])
def test_countdown_begins_anew_after_work_and_where_no_jobs_are_taken(
    countdown: IdleCountdown, clock: Clock, state: dict[str, bool]
) -> None:
    at(countdown, clock, 0)

    assert not at(countdown, clock, 70, **state)
    assert [at(countdown, clock, seconds) for seconds in (71, 130, 131)] == [False, False, True]


def test_countdown_begins_anew_after_what_was_taken_between_two_ticks(countdown: IdleCountdown, clock: Clock) -> None:
    at(countdown, clock, 0)

    assert not at(countdown, clock, 59, num_taken=1)
    assert not at(countdown, clock, 61, num_taken=1)
    assert not at(countdown, clock, 120, num_taken=1)
    assert at(countdown, clock, 121, num_taken=1)


def test_countdown_waits_for_a_delivery_that_is_passed_on_and_goes_on_meanwhile(
    countdown: IdleCountdown, clock: Clock
) -> None:
    at(countdown, clock, 0)

    assert not at(countdown, clock, 60, has_tasks=True)
    assert at(countdown, clock, 60.1)
