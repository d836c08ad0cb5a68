"""The backend fails, hangs, or answers and is not heard: every end arrives, under one id, and no job waits for it."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from email.utils import formatdate

import pytest

from clients.webhooks import Webhook, WebhookClient, WebhookKind, WebhookResult
from config.backend import BackendSettings
from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.proxy import DOWN, UP, Link, Sign
from tests.faults.station import DONE, POST_OF_COMPLETE, Job, Station, answers, new_station
from tests.support.long import long
from tests.support.servers.clients_servers import AnsweringServer, Server, answer
from tests.support.world import Worker, eventually
from worker.results.address_breaker import REFUSALS_TO_OPEN

DELAYS_SECONDS = (0.2, 0.4, 1.2, 1.2)
# Less than the third wait: the outbox waits that one out.
PATIENCE_SECONDS = 1.0
TRANSIENT_SECONDS = 1.0
CALL_SECONDS = 5.0  # an end that a busy machine takes longer for is told twice
PROGRESS_CALL_SECONDS = 2.0
DAY_SECONDS = 24 * 3600
CONSTANTS = {
    "worker.results.notifier:DELAYS_SECONDS": DELAYS_SECONDS,
    "worker.results.notifier:PATIENCE_SECONDS": PATIENCE_SECONDS,
    "worker.results.notifier:UNKNOWN_IS_TRANSIENT_SECONDS": TRANSIENT_SECONDS,
    "worker.results.notifier:CALL_DEADLINE_SECONDS": CALL_SECONDS,
    "worker.progress.reporter:CALL_DEADLINE_SECONDS": PROGRESS_CALL_SECONDS,
    "worker.results.pacing:OWN_FAILURE_DELAYS_SECONDS": DELAYS_SECONDS,
    # With three events parked one is behind those in hand.
    "worker.results.outbox:PREFETCH": 2,
}
MILESTONES = range(0, 100, 10)
# Within which the worker acts on what its readiness tells at once.
TICK_SECONDS = 0.5


@pytest.fixture(scope="module")
def station(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Station]:
    with new_station(rabbitmq, s3_server, tmp_path_factory.mktemp("station")) as made:
        made.start_worker(constants=CONSTANTS, PROGRESS_MILESTONES=",".join(map(str, MILESTONES)))
        yield made


@pytest.fixture(autouse=True)
def worker(station: Station) -> Worker:
    """Start one worker for all tests, after each of which it must be as good as new."""
    station.make_sound()
    worker = station.world.workers[0]
    eventually(lambda: worker.get("/health/ready")[0] == 200, worker.log_tail)
    station.world.wait_until_clean()
    return worker


def posted_at(station: Station, job: Job) -> list[float]:
    return [call.received_at for call in station.world.backend.calls("complete", job.generation_id)]


def num_parked(station: Station) -> int:
    return sum(station.world.queues().get(".outbox", ()))


def wait_until_parked(station: Station, count: int) -> None:
    """Return once so many ends are in the outbox and no job is in hand."""
    world = station.world
    eventually(lambda: num_parked(station) == count, lambda: f"{world.queues()}\n{world.workers[0].log_tail()}")
    eventually(lambda: world.queues()[""] == (0, 0), lambda: str(world.queues()))


def wait_for_dead_letters(station: Station, count: int = 1) -> None:
    station.world.wait_until_clean(dead=count)


def test_end_refused_three_times_is_redelivered_unchanged_after_growing_waits(station: Station, worker: Worker) -> None:
    station.world.backend.answer("complete", 500, times=3)

    job = station.publish()
    station.assert_complete_once(job, num_posts=4)

    calls = station.world.backend.calls("complete", job.generation_id)
    assert [call.status for call in calls] == [500, 500, 500, 200]
    assert {call.headers["webhook-id"] for call in calls} == {f"{job.task_id}:complete"}
    assert all(call.body == calls[0].body for call in calls)
    # By the worker's own clock. How long each wait is, and behind which one the event is parked, is in test_notifier:
    # on a busy machine the patience is over sooner, and the outbox begins with the shortest wait.
    (out,) = [line for line in worker.events("job out") if line["task_id"] == job.task_id]
    assert out["stages"]["notify"] >= DELAYS_SECONDS[0]


def test_backend_that_always_fails_delays_no_job_and_leaves_a_dead_letter_after_a_day(station: Station) -> None:
    world = station.world
    world.backend.answer("complete", 500)
    jobs = [station.publish() for _ in range(3)]
    wait_until_parked(station, 3)
    assert [station.num_runs(job) for job in jobs] == [1, 1, 1]

    # The other kind of end goes through meanwhile.
    failed = world.publish(prompt="fail@2")
    assert world.wait_for_end(failed).kind == "failed"

    station.set_clock(DAY_SECONDS + 60)
    wait_for_dead_letters(station, 3)
    assert all(b"result_url" in body and "500" in reason for body, reason in world.dead_letters())
    assert [world.backend.ends(job.generation_id) for job in jobs] == [[], [], []]


def test_backend_that_is_down_delays_no_job_and_gets_each_end_once_it_is_back(station: Station) -> None:
    station.backend.refuse()
    station.backend.reset()
    try:
        jobs = [station.publish() for _ in range(3)]
        wait_until_parked(station, 3)
    finally:
        station.backend.listen()

    for job in jobs:
        station.assert_complete_once(job)


def never_taken(station: Station, job: Job) -> None:
    """Make the backend answer 500 to every webhook of the job from now on."""
    sign = Sign(UP, f'"generation_id":{job.generation_id}'.encode())
    station.backend.when(sign, do=answers(500), times=None)


def test_events_never_taken_delay_none_that_an_outage_parked(station: Station) -> None:
    world = station.world
    # Given as many events that are never taken as the broker gives at once
    world.backend.answer("complete", 500)
    bad = [station.publish(), station.publish()]
    wait_until_parked(station, 2)
    for job in bad:
        never_taken(station, job)
    world.backend.answer("complete", 200)

    # When an outage parks two more
    world.backend.stop()
    good = [station.publish() for _ in range(2)]
    wait_until_parked(station, 4)
    world.backend.start()

    # Then these are told, and those stay
    for job in good:
        assert world.wait_for_end(job.generation_id).kind == "complete"
    eventually(lambda: num_parked(station) == 2, lambda: str(world.queues()))
    assert [len(world.backend.ends(job.generation_id)) for job in (*good, *bad)] == [1, 1, 0, 0]

    # And once the backend takes them, they are told as well, none twice
    station.backend.pass_on()
    for job in bad:
        station.assert_complete_once(job, num_posts=None)
    assert [len(world.backend.ends(job.generation_id)) for job in (*good, *bad)] == [1, 1, 1, 1]


@long
def test_call_to_a_hanging_backend_times_out_and_is_delivered_later(station: Station) -> None:
    job = station.publish_held()
    station.backend.black_hole()
    try:
        station.release(job)
        wait_until_parked(station, 1)
    finally:
        station.backend.pass_on()
        station.backend.reset()

    station.assert_complete_once(job)


@long
def test_dripping_answer_ends_with_the_call_and_the_end_is_redelivered(station: Station) -> None:
    job = station.publish_held()
    station.backend.drip(0.4, DOWN)
    station.release(job)
    eventually(lambda: station.posts(job) == 2, station.world.workers[0].log_tail)
    station.backend.pass_on()

    station.assert_complete_once(job, num_posts=None)


def test_end_whose_answer_was_lost_is_redelivered_under_the_same_id(station: Station, worker: Worker) -> None:
    lost = station.backend.when(POST_OF_COMPLETE, DONE, do=Link.reset)
    ambiguous_before = worker.metric("darkroom_webhook_ambiguous_total")

    job = station.publish()
    station.assert_complete_once(job, num_posts=2)

    assert lost.num_fired == 1
    assert worker.metric("darkroom_webhook_ambiguous_total") == ambiguous_before + 1


@contextmanager
def wrong_token(station: Station) -> Iterator[None]:
    backend = station.world.backend
    right, backend.token = backend.token, "rotated"
    try:
        yield
    finally:
        backend.token = right


@contextmanager
def forbidden(station: Station) -> Iterator[None]:
    trigger = station.backend.when(Sign(UP, b"Bearer "), do=answers(403), times=None)
    yield
    assert trigger.num_fired >= 3
    station.backend.pass_on()


@long
@pytest.mark.parametrize("refusal", [wrong_token, forbidden])
def test_backend_that_refuses_the_worker_stops_drawing_until_it_accepts_again(
    station: Station, worker: Worker, refusal: Callable[[Station], AbstractContextManager[None]]
) -> None:
    world = station.world
    with refusal(station):
        drawn = [station.publish() for _ in range(3)]
        eventually(lambda: "refuses this worker" in worker.get("/health/ready")[1], worker.log_tail)
        time.sleep(TICK_SECONDS)
        waiting = [station.publish() for _ in range(2)]
        time.sleep(TICK_SECONDS)
        world.wait_for_depth(2, 0)
        assert [station.num_runs(job) for job in waiting] == [0, 0]
        assert world.backend.ends(drawn[0].generation_id) == []

    for job in (*drawn, *waiting):
        station.assert_complete_once(job, num_posts=None)
    assert worker.get("/health/ready")[0] == 200


@long
def test_end_of_a_generation_unknown_yet_is_redelivered_until_it_is_taken(station: Station) -> None:
    station.world.backend.answer("complete", 404, times=3)

    job = station.publish()
    eventually(lambda: station.posts(job) == 4, lambda: str(station.world.queues()))
    station.assert_complete_once(job, num_posts=4)


def test_end_of_a_generation_never_known_becomes_a_dead_letter(station: Station) -> None:
    world = station.world
    world.backend.answer("complete", 404)

    job = station.publish()
    wait_for_dead_letters(station)

    assert "404" in world.dead_letters()[0][1]
    times = posted_at(station, job)
    assert len(times) >= 3
    # Half of it: the worker's patience begins with its sending, these times are the posts' arrivals.
    assert times[-1] - times[0] >= TRANSIENT_SECONDS / 2


def in_three_seconds() -> str:
    # Whole seconds: it may be two and a little.
    return formatdate(time.time() + 3, usegmt=True)


# A job's thread has the patience for the second alone, and the outbox must know of the rest.
PAUSES: dict[str, tuple[Callable[[], str], float]] = {
    "seconds": (lambda: "2", 2.0),
    "a date": (in_three_seconds, 2.0),
    "nonsense": (lambda: "soon", DELAYS_SECONDS[0]),
}


@pytest.mark.parametrize("name", ["seconds", pytest.param("a date", marks=long), "nonsense"])
def test_retry_after_of_the_backend_is_obeyed(station: Station, name: str) -> None:
    asked, at_least_seconds = PAUSES[name]
    refused_at: list[float] = []

    def note_and_refuse(link: Link) -> None:
        refused_at.append(time.time())
        answers(429, Retry_After=asked())(link)

    station.backend.when(POST_OF_COMPLETE, do=note_and_refuse)
    job = station.publish()
    station.assert_complete_once(job)

    waited = posted_at(station, job)[0] - refused_at[0]
    assert waited >= at_least_seconds


def test_redirect_is_a_refusal_and_the_token_is_not_forwarded(station: Station) -> None:
    world = station.world
    with AnsweringServer([answer(200)]) as canary:
        station.backend.when(POST_OF_COMPLETE, do=answers(302, Location=canary.url), times=None)
        job = station.publish()
        wait_for_dead_letters(station)

    assert "302" in world.dead_letters()[0][1]
    assert canary.num_connections == 0
    assert world.backend.ends(job.generation_id) == []


@pytest.mark.parametrize("status", [400, 409, 410, 422])
def test_event_refused_for_good_is_sent_once_and_dead_lettered(station: Station, status: int) -> None:
    world = station.world
    world.backend.answer("complete", status, times=1)

    job = station.publish()
    wait_for_dead_letters(station)

    assert station.posts(job) == 1
    assert str(status) in world.dead_letters()[0][1]


@pytest.mark.parametrize(("status", "words"), [(400, "ALLOWED_HOSTS"), (404, "BACKEND_API_URL")])
def test_backend_that_refuses_every_end_stops_drawing_and_gets_the_ends_later(
    station: Station, worker: Worker, status: int, words: str
) -> None:
    world = station.world
    station.assert_complete_once(station.publish())
    station.backend.when(POST_OF_COMPLETE, do=answers(status), times=None)

    # When ends are refused in a row, then jobs stay where another worker may take them
    drawn = [station.publish() for _ in range(REFUSALS_TO_OPEN)]
    eventually(lambda: "refuses this worker" in worker.get("/health/ready")[1], worker.log_tail)
    assert words in worker.get("/health/ready")[1]
    assert worker.metric("darkroom_ready") == 0
    time.sleep(TICK_SECONDS)
    waiting = [station.publish() for _ in range(2)]
    world.wait_for_depth(2, 0)
    time.sleep(2 * TRANSIENT_SECONDS)

    # And what was refused since the breaker opened is told once the address is right, as are those that waited
    station.backend.pass_on()
    eventually(lambda: worker.get("/health/ready")[0] == 200, worker.log_tail)
    dead = world.dead_letters()
    assert len(dead) < REFUSALS_TO_OPEN
    delivered = [job for job in drawn if not any(str(job.generation_id).encode() in body for body, _ in dead)]
    for job in (*delivered, *waiting):
        station.assert_complete_once(job, num_posts=None)


@pytest.mark.parametrize(("status", "delay_seconds"), [(500, 0.0), (200, 5.0)])
def test_progress_that_is_not_taken_delays_no_end_and_never_follows_it(
    station: Station, worker: Worker, status: int, delay_seconds: float
) -> None:
    backend = station.world.backend
    backend.answer("progress", status, delay_seconds=delay_seconds)

    # Drawn while the first report is under way: the next one waits behind it.
    job = station.publish(num_inference_steps=40)
    eventually(lambda: station.num_finished(job) == 1, worker.log_tail)
    num_begun = len(backend.calls("progress", job.generation_id))
    assert station.world.wait_for_end(job.generation_id).kind == "complete"

    time.sleep(PROGRESS_CALL_SECONDS)
    (ended_at,) = posted_at(station, job)
    calls = backend.calls("progress", job.generation_id)
    if delay_seconds:
        assert len(calls) <= num_begun + 1  # the one under way was waited for, and no others
    percents = [call.body["progress"]["progress_percent"] for call in calls]
    assert percents == sorted(set(percents))
    assert percents
    assert all(call.received_at < ended_at for call in calls)


class PlainServer(Server):
    """Answers whatever comes that it is well."""

    def converse(self, peer: socket.socket) -> None:
        while chunk := peer.recv(65536):
            self.requests.append(chunk)
            peer.sendall(answer(200))


def test_https_address_of_a_plain_http_server_gets_no_webhook() -> None:
    with PlainServer() as server:
        settings = BackendSettings(
            BACKEND_API_URL=f"https://127.0.0.1:{server.port}",  # type: ignore[call-arg]
            INTERNAL_API_TOKEN="canary-token",
        )
        attempt = WebhookClient(settings).send(Webhook(WebhookKind.COMPLETE, "id", {"prompt": "canary"}))

    assert (attempt.result, attempt.is_ambiguous) == (WebhookResult.RETRY, False)
    assert server.requests != []
    assert b"canary" not in b"".join(server.requests)
