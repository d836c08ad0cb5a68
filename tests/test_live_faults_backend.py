"""The backend fails, hangs, or answers and is not heard: every end arrives, under one id, and no job waits for it."""

import time
from collections.abc import Iterator
from itertools import pairwise

import pytest

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.clients_servers import AnsweringServer, answer
from tests.faults.proxy import Link
from tests.faults.station import DONE, POST_OF_COMPLETE, Job, Station, answers, long, new_station
from tests.world import Worker, eventually

pytestmark = long  # `make faults` runs them

DELAYS_SECONDS = (0.3, 0.6, 2.0, 2.0)
TRANSIENT_SECONDS = 2.0
DAY_SECONDS = 24 * 3600
CONSTANTS = {
    "worker.notifying:DELAYS_SECONDS": DELAYS_SECONDS,
    "worker.notifying:PATIENCE_SECONDS": 1.5,
    "worker.notifying:UNKNOWN_IS_TRANSIENT_SECONDS": TRANSIENT_SECONDS,
    "worker.notifying:CALL_DEADLINE_SECONDS": 1.0,
    "worker.progress:CALL_DEADLINE_SECONDS": 0.5,
}


@pytest.fixture(scope="module")
def station(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Station]:
    with new_station(rabbitmq, s3_server, tmp_path_factory.mktemp("station")) as made:
        made.start_worker(constants=CONSTANTS)
        yield made


@pytest.fixture(autouse=True)
def worker(station: Station) -> Worker:
    """One worker for all tests, after each of which it must be as good as new."""
    station.make_sound()
    worker = station.world.workers[0]
    eventually(lambda: worker.get("/health/ready")[0] == 200, 30, worker.log_tail)
    station.world.wait_until_clean()
    return worker


def posted_at(station: Station, job: Job) -> list[float]:
    return [call.received_at for call in station.world.backend.calls("complete", job.generation_id)]


def test_a_backend_that_fails_three_times_hears_the_same_again_after_growing_waits(station: Station) -> None:
    station.world.backend.answer("complete", 500, times=3)

    job = station.publish()
    station.assert_complete_once(job, num_posts=4)

    calls = station.world.backend.calls("complete", job.generation_id)
    assert [call.status for call in calls] == [500, 500, 500, 200]
    assert {call.headers["webhook-id"] for call in calls} == {f"{job.task_id}:complete"}
    assert all(call.body == calls[0].body for call in calls)
    # The last wait is more than a job's thread has patience for: the event moves to the outbox meanwhile.
    times = posted_at(station, job)
    waits = [after - before for before, after in pairwise(times)]
    assert all(wait >= planned for wait, planned in zip(waits, DELAYS_SECONDS, strict=False)), waits


def test_a_backend_that_fails_for_ever_holds_no_job_and_leaves_a_dead_letter_after_a_day(station: Station) -> None:
    world = station.world
    world.backend.answer("complete", 500)
    jobs = [station.publish() for _ in range(3)]
    eventually(lambda: sum(world.queues()[".outbox"]) == 3, 20, lambda: str(world.queues()))
    assert world.queues()[""] == (0, 0)
    assert [station.num_runs(job) for job in jobs] == [1, 1, 1]

    # The other kind of end goes through meanwhile.
    failed = world.publish(prompt="fail@2")
    assert world.wait_for_end(failed, 5).kind == "failed"

    station.set_clock(DAY_SECONDS + 60)
    world.wait_until_clean(dead=3)
    assert all(b"result_url" in body and "500" in reason for body, reason in world.dead_letters())
    assert [world.backend.ends(job.generation_id) for job in jobs] == [[], [], []]


def test_a_backend_that_hangs_is_given_up_in_time_and_hears_of_it_later(station: Station) -> None:
    world = station.world
    job = station.publish_held()
    station.backend.black_hole()
    station.release(job)
    eventually(lambda: sum(world.queues().get(".outbox", (0,))) == 1, 10, lambda: str(world.queues()))
    assert world.queues()[""] == (0, 0)
    station.backend.pass_on()

    station.assert_complete_once(job)


def test_an_answer_that_drips_ends_with_the_call_and_the_end_is_told_again(station: Station) -> None:
    job = station.publish_held()
    station.backend.drip(0.3)
    station.release(job)
    time.sleep(1.5)
    station.backend.pass_on()

    station.assert_complete_once(job, num_posts=None)


def test_an_answer_lost_after_the_backend_has_acted_is_told_again_under_the_same_id(
    station: Station, worker: Worker
) -> None:
    lost = station.backend.when(POST_OF_COMPLETE, DONE, do=Link.reset)
    ambiguous_before = worker.metric("darkroom_webhook_ambiguous_total")

    job = station.publish()
    station.assert_complete_once(job, num_posts=2)

    assert lost.num_fired == 1
    assert worker.metric("darkroom_webhook_ambiguous_total") == ambiguous_before + 1


def test_a_generation_that_the_backend_does_not_know_yet_is_told_until_it_does(station: Station) -> None:
    station.world.backend.answer("complete", 404, times=3)

    station.assert_complete_once(station.publish(), num_posts=4)


def test_a_generation_that_the_backend_never_knows_leaves_a_dead_letter(station: Station) -> None:
    world = station.world
    world.backend.answer("complete", 404)

    job = station.publish()
    world.wait_until_clean(dead=1)

    assert "404" in world.dead_letters()[0][1]
    times = posted_at(station, job)
    assert times[-1] - times[0] >= TRANSIENT_SECONDS
    assert len(times) >= 3


@pytest.mark.parametrize("seconds", [1, 2])
def test_a_backend_that_asks_for_a_pause_gets_it(station: Station, seconds: int) -> None:
    # The longer one is more than a job's thread has patience for: the event moves to the outbox.
    refused_at: list[float] = []
    refuse = answers(429, Retry_After=str(seconds))

    def note_and_refuse(link: Link) -> None:
        refused_at.append(time.time())
        refuse(link)

    station.backend.when(POST_OF_COMPLETE, do=note_and_refuse)
    job = station.publish()
    station.assert_complete_once(job)

    assert posted_at(station, job)[0] - refused_at[0] >= seconds


def test_a_redirect_is_a_refusal_and_the_token_goes_nowhere(station: Station) -> None:
    world = station.world
    with AnsweringServer([answer(200)]) as canary:
        station.backend.when(POST_OF_COMPLETE, do=answers(302, Location=canary.url), times=None)
        job = station.publish()
        world.wait_until_clean(dead=1)

    assert "302" in world.dead_letters()[0][1]
    assert canary.num_connections == 0
    assert world.backend.ends(job.generation_id) == []


@pytest.mark.parametrize("status", [400, 409, 422])
def test_an_event_refused_for_good_is_told_once_and_left_as_a_dead_letter(station: Station, status: int) -> None:
    world = station.world
    world.backend.answer("complete", status, times=1)

    job = station.publish()
    world.wait_until_clean(dead=1)

    assert station.posts(job) == 1
    assert str(status) in world.dead_letters()[0][1]


@pytest.mark.parametrize(("status", "delay_seconds"), [(500, 0.0), (200, 5.0)])
def test_progress_that_is_not_taken_delays_no_end_and_never_follows_it(
    station: Station, status: int, delay_seconds: float
) -> None:
    backend = station.world.backend
    backend.answer("progress", status, delay_seconds=delay_seconds)

    started_at = time.monotonic()
    # Drawn while the first report is under way: the next one waits behind it.
    job = station.publish(num_inference_steps=40)
    station.assert_complete_once(job)

    assert time.monotonic() - started_at < 4
    time.sleep(1)
    (ended_at,) = posted_at(station, job)
    calls = backend.calls("progress", job.generation_id)
    percents = [call.body["progress"]["progress_percent"] for call in calls]
    assert percents == sorted(set(percents))
    assert all(call.received_at < ended_at for call in calls)
