"""Timeouts on one thread: each call comes once it is due, in order, and a cancelled one never."""

import queue
import threading
import time

import pytest

from clients.timer_thread import TimerThread

# A bound for what hangs, not for what is slow.
HANG_SECONDS = 120.0
LONG_SECONDS = 3600.0


def test_calls_are_made_in_the_order_in_which_they_are_due() -> None:
    timers, made = TimerThread(), queue.SimpleQueue[str]()
    started_at = time.monotonic()

    for seconds, name in ((LONG_SECONDS, "last"), (0.3, "third"), (0.1, "first"), (0.2, "second")):
        timers.call_after(seconds, lambda name=name: made.put(name))  # type: ignore[misc]

    assert [made.get(timeout=HANG_SECONDS) for _ in range(3)] == ["first", "second", "third"]
    assert time.monotonic() - started_at >= 0.3
    assert made.empty()


def test_call_that_is_overdue_is_made_at_once() -> None:
    timers, made = TimerThread(), threading.Event()

    timers.call_after(-1.0, made.set)

    assert made.wait(HANG_SECONDS)


def test_cancelled_call_is_not_made() -> None:
    timers, made = TimerThread(), queue.SimpleQueue[str]()
    cancelled = timers.call_after(0.05, lambda: made.put("cancelled"))

    timers.cancel(cancelled)
    timers.cancel(cancelled)
    timers.call_after(0.1, lambda: made.put("later"))

    assert made.get(timeout=HANG_SECONDS) == "later"


def test_call_set_by_another_is_made() -> None:
    timers, made = TimerThread(), threading.Event()

    timers.call_after(0.0, lambda: timers.call_after(0.0, made.set))

    assert made.wait(HANG_SECONDS)


def test_failed_call_is_logged_and_later_ones_are_made(caplog: pytest.LogCaptureFixture) -> None:
    timers, made = TimerThread(), threading.Event()

    timers.call_after(0.0, lambda: int("none"))
    timers.call_after(0.01, made.set)

    assert made.wait(HANG_SECONDS)
    assert "ValueError" in caplog.text


def test_timeouts_need_one_thread_and_keep_nothing_that_was_cancelled() -> None:
    timers = TimerThread()
    num_threads = threading.active_count()

    for _ in range(1000):
        timers.cancel(timers.call_after(LONG_SECONDS, threading.Event().set))

    assert threading.active_count() == num_threads + 1
    assert not timers._timeouts
