"""What is counted of a job that comes back, and who waits while a suspect is at work."""

import threading
from collections.abc import Callable
from dataclasses import replace

from worker.amqp.delivery import Delivery
from worker.jobs.recovery import SUSPECT_CRASHES, CrashCounter, SuspectIsolation, is_suspect

JOB, OTHER_JOB = b"a job", b"another job"


def delivered(
    body: bytes = JOB, *, session: int = 1, tag: int = 1, num_deliveries: int = 0, num_crashes: int = 0
) -> Delivery:
    return Delivery(
        body=body,
        queue="jobs.recover",
        is_redelivered=num_deliveries > 0,
        attempt=1,
        num_deliveries=num_deliveries,
        since=0.0,
        session=session,
        tag=tag,
        channel_number=1,
        num_crashes=num_crashes,
    )


# --- Whose returns are counted


def test_redelivery_from_another_worker_is_a_crash() -> None:
    assert CrashCounter().num_crashes(delivered(num_deliveries=2, num_crashes=3)) == 5


def test_redelivery_after_a_lost_connection_here_is_no_crash() -> None:
    returns = CrashCounter()
    returns.num_crashes(delivered(num_crashes=3))

    assert returns.num_crashes(delivered(session=2, num_crashes=3, num_deliveries=1)) == 3


def test_connections_lost_before_a_copy_was_confirmed_are_all_forgiven() -> None:
    returns = CrashCounter()
    returns.num_crashes(delivered(num_crashes=1))

    for number in range(1, 26):
        assert returns.num_crashes(delivered(session=1 + number, num_crashes=1, num_deliveries=number)) == 1


def test_renewed_copies_begin_with_what_is_known() -> None:
    returns = CrashCounter()
    first = delivered()
    returns.num_crashes(first)
    for session in range(2, 27):
        returned = delivered(session=session, num_deliveries=1)
        assert returns.num_crashes(returned) == 0
        assert returns.num_crashes(delivered(session=session, tag=2)) == 0


def test_a_crash_elsewhere_between_two_deliveries_here_is_counted() -> None:
    returns = CrashCounter()
    returns.num_crashes(delivered(num_crashes=1))

    # Returned by us, and then by a worker that was killed with it
    assert returns.num_crashes(delivered(session=2, num_crashes=1, num_deliveries=2)) == 2


def test_redelivery_of_ours_that_another_worker_counted_is_forgiven() -> None:
    returns = CrashCounter()
    returns.num_crashes(delivered())

    assert returns.num_crashes(delivered(session=2, num_crashes=1)) == 0


def test_a_message_whose_ack_was_lost_and_its_copy_are_both_forgiven() -> None:
    returns = CrashCounter()
    returns.num_crashes(delivered())

    # Its copy was confirmed in the second session, its ack was lost with it, and so it went on
    for session in range(2, 27):
        assert returns.num_crashes(delivered(session=session, num_deliveries=session - 1)) == 0
        assert returns.num_crashes(delivered(session=session, tag=2, num_deliveries=1)) == 0
        assert returns.num_crashes(delivered(session=session, tag=3)) == 0


def test_redeliveries_are_counted_by_message() -> None:
    returns = CrashCounter()
    returns.num_crashes(delivered())

    assert returns.num_crashes(delivered(OTHER_JOB, session=2, num_deliveries=1)) == 1


# --- One suspect at a time


def in_background(wait: Callable[[], bool]) -> tuple[threading.Thread, list[bool]]:
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(wait()), daemon=True)
    thread.start()
    return thread, answers


def test_a_job_becomes_a_suspect_by_its_crashes_and_returns_together() -> None:
    assert not is_suspect(delivered(num_crashes=SUSPECT_CRASHES - 1))
    assert is_suspect(delivered(num_crashes=SUSPECT_CRASHES - 1, num_deliveries=1))


def test_suspect_job_begins_once_the_others_ended_and_runs_alone() -> None:
    quarantine, is_draining = SuspectIsolation(), threading.Event()
    suspect, beside, late = delivered(num_crashes=SUSPECT_CRASHES), delivered(tag=2), delivered(tag=3)
    assert quarantine.enter(suspect)
    assert quarantine.enter(beside)

    thread, answers = in_background(lambda: quarantine.isolate(suspect, is_draining))
    while quarantine.enter(late):
        quarantine.leave(late)
    assert not answers
    quarantine.leave(late)
    quarantine.leave(beside)

    thread.join(120)
    assert answers == [True]
    assert not quarantine.enter(late)
    quarantine.leave(suspect)
    assert quarantine.enter(late)


def test_one_of_two_suspect_jobs_runs_and_the_other_is_released() -> None:
    quarantine, is_draining = SuspectIsolation(), threading.Event()
    suspects = [delivered(tag=tag, num_crashes=SUSPECT_CRASHES) for tag in (1, 2)]
    for suspect in suspects:
        assert quarantine.enter(suspect)

    thread, answers = in_background(lambda: quarantine.isolate(suspects[0], is_draining))
    while quarantine.enter(replace(suspects[1])):
        pass
    assert not quarantine.isolate(suspects[1], is_draining)
    quarantine.leave(suspects[1])

    thread.join(120)
    assert answers == [True]


def test_suspect_job_stops_waiting_once_the_worker_stops() -> None:
    quarantine, is_draining = SuspectIsolation(), threading.Event()
    suspect = delivered(num_crashes=SUSPECT_CRASHES)
    quarantine.enter(suspect)
    quarantine.enter(delivered(tag=2))
    is_draining.set()

    assert quarantine.isolate(suspect, is_draining)
