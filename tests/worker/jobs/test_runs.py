"""A job is at work here once, and settles every delivery that asked for it."""

import itertools
import threading
import time
from dataclasses import replace

import pytest

from inference.request import Stage
from worker.amqp.delivery import Delivery
from worker.jobs.runs import Phase, Run, Runs
from worker.messages.job import JobRejected

TASK_ID = "660f9511-f3ac-52e5-b827-557766551111"


def asked_for(task_id: str = TASK_ID) -> JobRejected:
    return JobRejected("INVALID_PROMPT", "prompt is empty", task_id=task_id, generation_id=456)


def delivered(tag: int, *, attempt: int = 1, num_deliveries: int = 0) -> Delivery:
    return Delivery(
        body=b"{}",
        queue="image_generation",
        is_redelivered=tag > 1,
        attempt=attempt,
        num_deliveries=num_deliveries,
        since=0.0,
        session=tag,
        tag=tag,
        channel_number=1,
    )


def begun(runs: Runs, *, task_id: str = TASK_ID, tag: int = 1) -> Run:
    run = runs.attach_or_start(asked_for(task_id), delivered(tag))
    assert run is not None
    return run


def test_the_first_delivery_of_a_task_begins_a_run() -> None:
    runs = Runs()

    run = begun(runs)

    assert (run.task_id, run.generation_id) == (TASK_ID, 456)
    assert runs.all() == [run]
    assert TASK_ID in runs


def test_detached_run_keeps_its_attempt_and_recoveries() -> None:
    runs = Runs()
    run = begun(runs, tag=7)

    assert [delivery.tag for delivery in runs.detach_deliveries(run)] == [7]

    assert run.deliveries == []
    assert (run.first.tag, run.attempt, run.num_recoveries) == (7, 1, 0)
    assert runs.finish(run) == []


def test_finished_run_has_no_deliveries_to_detach() -> None:
    runs = Runs()
    run = begun(runs)
    runs.finish(run)

    assert runs.detach_deliveries(run) == []


def test_another_delivery_of_the_same_task_is_adopted_and_settled_with_the_run() -> None:
    # Given a job at work
    runs = Runs()
    run = begun(runs)

    # When the broker delivers it twice more
    adopted = [runs.attach_or_start(asked_for(), delivered(tag)) for tag in (2, 3)]

    # Then no second run begins, and the one run answers for all three
    assert adopted == [None, None]
    assert [delivery.tag for delivery in runs.finish(run)] == [1, 2, 3]
    assert TASK_ID not in runs
    assert runs.all() == []


def test_finished_task_may_start_again() -> None:
    runs = Runs()
    first = begun(runs)
    runs.finish(first)

    second = begun(runs, tag=2)

    assert second is not first
    assert [delivery.tag for delivery in runs.finish(second)] == [2]


def test_different_tasks_run_side_by_side() -> None:
    runs = Runs()
    first, second = begun(runs, task_id="a"), begun(runs, task_id="b")

    runs.finish(first)

    assert runs.all() == [second]


def test_one_of_many_threads_with_one_task_starts_it_and_no_delivery_is_lost() -> None:
    runs, begun_runs, ready = Runs(), [], threading.Barrier(16)

    def deliver(tag: int) -> None:
        ready.wait()
        begun_runs.append(runs.attach_or_start(asked_for(), delivered(tag)))

    threads = [threading.Thread(target=deliver, args=(tag,)) for tag in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    (run,) = [run for run in begun_runs if run is not None]
    assert sorted(delivery.tag for delivery in runs.finish(run)) == list(range(16))


def test_the_attempt_is_that_of_the_first_delivery_and_the_recoveries_are_the_most_counted() -> None:
    run = Run(TASK_ID, 456, asked_for(), [delivered(1, attempt=3, num_deliveries=1)])

    run.deliveries.append(delivered(2, attempt=1, num_deliveries=4))

    assert (run.attempt, run.num_recoveries) == (3, 4)


def test_a_stage_is_timed_and_names_the_phase_even_when_it_breaks_off() -> None:
    run = Run(TASK_ID, 456, asked_for(), [delivered(1)])

    with run.stage(Phase.LEDGER):
        assert run.phase == "ledger"
    with pytest.raises(KeyError), run.stage(Phase.FETCH):
        raise KeyError

    assert [stage.name for stage in run.stages] == ["ledger", "fetch"]
    assert run.stages[1].started_at >= run.stages[0].started_at + run.stages[0].seconds
    assert all(0 <= stage.seconds < 1 for stage in run.stages)


def test_the_timeline_counts_from_the_run_s_start() -> None:
    run = Run(TASK_ID, 456, asked_for(), [delivered(1)], started_monotonic=100.0)
    run.stages += [Stage("ledger", 100.0, 0.0123456), Stage("denoise", 101.25, 12.5)]

    assert run.timeline() == (("ledger", 0.0, 0.0123), ("denoise", 1.25, 12.5))


def test_the_engine_s_stages_follow_the_run_s_own_without_gaps_behind_one_wait() -> None:
    run = begun(Runs())
    run.stages = [Stage("fetch", 10.0, 2.0)]
    # Handed over after 1 s, read for 0.5 s, and then 3 s of waiting for a lane
    stages = (Stage("adapt", 13.0, 0.5), Stage("encode", 16.5, 0.25), Stage("denoise", 16.75, 4.0))

    run.add_engine_stages(stages)

    assert [(stage.name, stage.started_at, stage.seconds) for stage in run.stages[1:]] == [
        ("wait", 12.0, 4.0),
        ("adapt", 16.0, 0.5),
        ("encode", 16.5, 0.25),
        ("denoise", 16.75, 4.0),
    ]


def test_engine_time_without_a_result_is_counted_by_the_phases_it_entered() -> None:
    run = begun(Runs())
    run.stages = [Stage("fetch", run.started_monotonic, 0.0)]

    with pytest.raises(KeyError), run.inside_engine():
        run.enter_phase(Phase.DENOISE)
        run.enter_phase(Phase.DENOISE)
        run.enter_phase(Phase.DECODE)
        raise KeyError

    stages = run.stages[1:]
    assert [stage.name for stage in stages] == ["wait", "denoise", "decode"]
    for before, after in itertools.pairwise(stages):
        assert before.started_at + before.seconds == pytest.approx(after.started_at)


def test_engine_time_is_counted_once_where_the_engine_reports_its_stages() -> None:
    run = begun(Runs())
    run.stages = [Stage("fetch", 10.0, 2.0)]

    with run.inside_engine():
        run.enter_phase(Phase.DENOISE)
        run.add_engine_stages((Stage("adapt", 13.0, 0.5), Stage("encode", 16.5, 0.25), Stage("denoise", 16.75, 4.0)))

    assert [stage.name for stage in run.stages] == ["fetch", "wait", "adapt", "encode", "denoise"]


def test_run_s_present_time_follows_the_monotonic_clock() -> None:
    run = Run(TASK_ID, 456, asked_for(), [delivered(1)], started_monotonic=time.monotonic() - 5.0, started_unix=1000.0)

    assert run.now == pytest.approx(1005.0, abs=1.0)


def test_second_copy_of_an_unsettled_message_is_redundant() -> None:
    runs = Runs()
    held = replace(delivered(1), num_crashes=1)
    runs.attach_or_start(asked_for(), held)

    assert runs.has_copy_of(TASK_ID, replace(held, tag=2))
    assert not runs.has_copy_of(TASK_ID, replace(held, tag=2, num_crashes=2))  # it knows of more crashes
    assert not runs.has_copy_of(TASK_ID, replace(held, tag=2, session=2))  # ours went back to the broker
    assert not runs.has_copy_of(TASK_ID, replace(held, tag=2, body=b"another message"))
    assert not runs.has_copy_of("another", held)
