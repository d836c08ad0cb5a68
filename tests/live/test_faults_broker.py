"""The way to the broker breaks, hangs or falsifies: nothing is lost, and nothing has an effect twice."""

import json
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pika
import pytest

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.proxy import DOWN, UP, Link, Proxy, Sign
from tests.faults.station import HEARTBEAT_SECONDS, Job, Station, new_station
from tests.hostile.raw_properties import FROM_THE_FIELD, Raw
from tests.support.long import long
from tests.support.servers.broker_admin import add_user, policy, wait_for_acks
from tests.support.world import Worker, eventually
from worker.amqp.connection import BLOCKED_TIMEOUT_SECONDS

# After so long the broker has given up a peer that it hears nothing of.
GIVEN_UP_SECONDS = 3 * HEARTBEAT_SECONDS
# pika looks every heartbeat and five seconds whether anything has come, and gives up at the second time;
# a slow machine has a minute more.
NOTICED_SECONDS = 2 * (HEARTBEAT_SECONDS + 5) + 60
# How long the broker waits for an ack where a test has it hurry, and how often it looks.
CONSUMER_TIMEOUT_SECONDS, CONSUMER_TICK_SECONDS = 4.0, 0.5
# Until a message that a backend publishes without a confirm is surely on the broker's disk.
UNCONFIRMED_SECONDS = 1.0
# Ten pictures at once by default, and two jobs more whose adapters are fetched meanwhile.
PREFETCH = 12
REFUSED_BACKOFF_SECONDS = 1.5


@pytest.fixture(scope="module")
def station(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Station]:
    with new_station(rabbitmq, s3_server, tmp_path_factory.mktemp("station")) as made:
        made.start_worker()
        yield made


@pytest.fixture
def worker(station: Station) -> Worker:
    """Start one worker for all tests, after each of which it must be as good as new."""
    station.make_sound()
    worker, *others = station.world.workers
    for other in others:
        other.kill()
    eventually(lambda: worker.get("/health/ready")[0] == 200, worker.log_tail)
    station.world.wait_until_clean()
    return worker


@pytest.fixture
def second(station: Station, worker: Worker) -> Iterator[Worker]:
    """Start another worker, which reaches the broker directly."""
    made = station.start_worker(RABBITMQ_PORT=str(station.world.rabbitmq.port))
    yield made
    made.kill()


@pytest.fixture
def hurried_broker(rabbitmq: RabbitMQ) -> Iterator[RabbitMQ]:
    """Shorten the broker's wait for an ack, on the channels that are opened from now on."""
    wait_for_acks(rabbitmq, CONSUMER_TIMEOUT_SECONDS, CONSUMER_TICK_SECONDS)
    yield rabbitmq
    wait_for_acks(rabbitmq, 1800, 60)


def num_adopted(worker: Worker) -> float:
    return worker.metric("darkroom_jobs_total", outcome="adopted")


def publish_followed(station: Station) -> tuple[Job, list[Link]]:
    """Publish a held job, and follow the connection of each delivery of it."""
    links: list[Link] = []
    station.broker.when(Sign(DOWN, b"hold@3"), do=links.append, times=None)
    return station.publish_held(), links


def delete_queue(station: Station, suffix: str = "") -> None:
    connection = pika.BlockingConnection(pika.URLParameters(station.world.rabbitmq.url))
    connection.channel().queue_delete(f"{station.world.queue}{suffix}")
    connection.close()


def leave_a_dead_letter(station: Station, body: bytes) -> None:
    station.world.publish_raw(body)
    station.world.wait_until_clean(dead=1)


def has_ended(worker: Worker, job: Job) -> bool:
    """Return whether the worker is done with the job, its webhook included."""
    return any(event["task_id"] == job.task_id for event in worker.events("job out"))


def distinct_ends(station: Station, job: Job) -> list[str]:
    """Return the distinct payloads of the job's end that the backend received."""
    return sorted({json.dumps(call.body) for call in station.world.backend.calls("complete", job.generation_id)})


# --- The connection ends


def closed(station: Station, _link: Link) -> None:
    station.world.rabbitmq.close_connections()


def reset(station: Station, link: Link) -> None:
    station.broker.reset(link)


@pytest.mark.parametrize("lose", [closed, reset])
def test_a_connection_lost_in_mid_job_is_adopted_and_no_tag_of_the_lost_session_is_sent(
    station: Station, worker: Worker, lose: Callable[[Station, Link], None]
) -> None:
    # Given a job in the middle, and the connection that it came by
    job, links = publish_followed(station)
    adopted_before = num_adopted(worker)

    # When that is lost, the same job comes once more by a new one, soon
    lose(station, links[0])
    eventually(lambda: num_adopted(worker) == adopted_before + 1, worker.log_tail, within_seconds=20)
    assert links[0].is_closed
    station.release(job)

    # Then it is drawn once, and the dead delivery's tag costs the new connection nothing
    station.assert_complete_once(job)
    time.sleep(0.5)
    assert not links[1].is_closed


def stopped(rabbitmq: RabbitMQ) -> None:
    rabbitmq.ctl("stop_app")
    time.sleep(1)
    rabbitmq.ctl("start_app")


def killed(rabbitmq: RabbitMQ) -> None:
    rabbitmq.kill()
    rabbitmq.start()


@long
@pytest.mark.parametrize("restart", [stopped, killed])
def test_a_broker_restarted_in_mid_job_has_kept_every_message_and_nothing_is_drawn_twice(
    station: Station, worker: Worker, restart: Callable[[RabbitMQ], None]
) -> None:
    leave_a_dead_letter(station, b"no job")
    job = station.publish_held()
    adopted_before = num_adopted(worker)
    time.sleep(UNCONFIRMED_SECONDS)

    restart(station.world.rabbitmq)

    eventually(lambda: num_adopted(worker) == adopted_before + 1, worker.log_tail)
    station.release(job)
    assert [body for body, _ in station.world.dead_letters()] == [b"no job"]
    station.assert_complete_once(job)


# --- The broker waits no longer


@long
def test_a_channel_that_the_broker_closed_is_noticed_and_its_job_adopted(
    station: Station, worker: Worker, hurried_broker: RabbitMQ
) -> None:
    station.broker.reset()
    eventually(lambda: worker.get("/health/ready")[0] == 503)
    eventually(lambda: worker.get("/health/ready")[0] == 200, worker.log_tail)

    # A job that is no third of the way to what the worker believes the timeout to be.
    job, links = publish_followed(station)
    eventually(lambda: len(links) == 2, worker.log_tail)
    station.release(job)

    station.assert_complete_once(job)


@long
def test_a_job_longer_than_the_broker_waits_goes_on_lease_and_keeps_its_connection(
    hurried_broker: RabbitMQ, s3_server: SeaweedFS, tmp_path: Path
) -> None:
    with new_station(hurried_broker, s3_server, tmp_path) as station:
        # Six seconds are the least that may be set, and a third of them less than the broker's four.
        station.start_worker(RABBITMQ_CONSUMER_TIMEOUT_SECONDS="6")
        job, links = publish_followed(station)
        time.sleep(2 * CONSUMER_TIMEOUT_SECONDS)
        station.release(job)

        station.assert_complete_once(job)
        assert len(set(links)) == 1
        assert not links[0].is_closed


# --- The broker is not heard


@long
def test_a_broker_that_falls_silent_delays_no_end_and_has_nothing_drawn_twice(station: Station, worker: Worker) -> None:
    job = station.publish_held()
    connections_before = station.broker.num_connections
    os.kill(station.world.rabbitmq.pid, signal.SIGSTOP)
    try:
        # The picture is stored and the backend told while no ack can be heard.
        station.release(job)
        station.world.wait_for_end(job.generation_id)
        # The silence is noticed, and a handshake without an answer is not waited for either.
        eventually(lambda: "broker" in worker.get("/health/ready")[1], worker.log_tail, within_seconds=NOTICED_SECONDS)
        eventually(lambda: station.broker.num_connections >= connections_before + 1, worker.log_tail)
    finally:
        os.kill(station.world.rabbitmq.pid, signal.SIGCONT)

    station.assert_complete_once(job)


@long
def test_a_job_behind_a_black_hole_goes_to_another_worker_and_one_end_wins(station: Station, worker: Worker) -> None:
    # Given a worker that goes on behind a connection without an end, and another one
    job = station.publish_held()
    other = station.start_worker(RABBITMQ_PORT=str(station.world.rabbitmq.port))
    station.broker.black_hole()
    fell_silent_at = time.monotonic()

    # When the broker gives the job to that
    station.wait_until_held(job, times=2)
    assert time.monotonic() - fell_silent_at < GIVEN_UP_SECONDS + 60
    station.release(job)

    # Then both finish it, and it has one end
    eventually(lambda: station.num_finished(job) == 2)
    for one in (worker, other):
        eventually(lambda one=one: has_ended(one, job), one.log_tail)
    station.assert_complete_once(job, num_runs=2, num_posts=None)
    assert len(distinct_ends(station, job)) == 1
    other.kill()
    station.broker.pass_on()
    station.broker.reset()


def by_chunks(station: Station) -> None:
    station.broker.delay(1.0)


def by_bytes(station: Station) -> None:
    station.broker.drip(0.02)


@long
@pytest.mark.parametrize("slow_down", [by_chunks, by_bytes])
def test_a_slow_link_costs_time_and_no_connection(
    station: Station, worker: Worker, slow_down: Callable[[Station], None]
) -> None:
    job, links = publish_followed(station)
    slow_down(station)
    time.sleep(GIVEN_UP_SECONDS + 1)
    station.release(job)

    station.assert_complete_once(job)
    assert len(links) == 1
    assert not links[0].is_closed


# --- The broker cannot be entered


def unknown_user(rabbitmq: RabbitMQ, name: str) -> tuple[dict[str, str], Callable[[], None]]:
    def make_known() -> None:
        add_user(rabbitmq, name, "canary-password")

    return {"RABBITMQ_USER": name, "RABBITMQ_PASS": "canary-password"}, make_known


def unknown_vhost(rabbitmq: RabbitMQ, name: str) -> tuple[dict[str, str], Callable[[], None]]:
    def make_known() -> None:
        rabbitmq.ctl("add_vhost", name)
        rabbitmq.ctl("set_permissions", "-p", name, "guest", ".*", ".*", ".*")

    return {"RABBITMQ_VHOST": name}, make_known


@long
@pytest.mark.parametrize("unknown", [unknown_user, unknown_vhost])
def test_worker_refused_by_the_broker_retries_seldom_and_begins_once_accepted(
    station: Station,
    worker: Worker,
    rabbitmq: RabbitMQ,
    unknown: Callable[[RabbitMQ, str], tuple[dict[str, str], Callable[[], None]]],
) -> None:
    constants = {
        "worker.amqp.connection:REFUSED_BACKOFF_SECONDS": REFUSED_BACKOFF_SECONDS,
        "worker.monitoring.gauges:GAUGE_SECONDS": 0.3,
    }
    name = f"late-{uuid.uuid4().hex[:8]}"
    asked_at: list[float] = []
    with Proxy(rabbitmq.port) as door:
        door.when(Sign(UP, b"AMQP"), do=lambda _: asked_at.append(time.monotonic()), times=None)
        env, make_known = unknown(rabbitmq, name)
        other = station.world.start_worker(**station.env(constants=constants) | env | {"RABBITMQ_PORT": str(door.port)})

        eventually(lambda: len(asked_at) == 3, other.log_tail)
        assert all(later - earlier >= REFUSED_BACKOFF_SECONDS for earlier, later in pairwise(asked_at)), asked_at
        assert "the broker" in other.get("/health/ready")[1]
        assert "canary-password" not in other.log.read_text()

        make_known()
        eventually(lambda: other.get("/health/ready")[0] == 200, other.log_tail)
        other.kill()


@long
def test_handshake_without_an_answer_times_out_and_is_retried(
    station: Station, worker: Worker, rabbitmq: RabbitMQ
) -> None:
    with Proxy(rabbitmq.port) as silent:
        silent.black_hole()
        env = station.env(constants={"worker.amqp.connection:STACK_TIMEOUT_SECONDS": 1.0})
        other = station.world.start_worker(**env | {"RABBITMQ_PORT": str(silent.port)})
        eventually(lambda: silent.num_connections >= 3, other.log_tail)
        assert other.get("/health/live")[0] == 200

        silent.pass_on()
        other.wait_until_ready()
        other.kill()


# --- The broker's queues and its memory


def test_a_queue_deleted_in_mid_job_is_there_again_and_the_job_ends_once(station: Station, worker: Worker) -> None:
    job = station.publish_held()
    delete_queue(station)
    eventually(lambda: station.world.queues().get("") == (0, 0), worker.log_tail)
    station.release(job)

    station.assert_complete_once(job)
    next_job = station.publish()
    assert station.world.wait_for_end(next_job.generation_id).kind == "complete"
    station.assert_complete_once(next_job)


def test_in_an_alarm_acks_go_through_and_what_must_be_published_is_not_lost(station: Station, worker: Worker) -> None:
    world = station.world
    # Given a worker that has published before: of a new connection the broker takes one message even in an alarm
    leave_a_dead_letter(station, b"no job")
    world.dead_letters()
    # And two jobs under way, one of which will have to leave a dead letter
    world.backend.answer("failed", 410)
    acked = station.publish_held()
    failing = station.publish("hold@3 fail@4")
    eventually(lambda: world.queues()[""] == (0, 2), lambda: str(world.queues()))
    world.rabbitmq.evaluate("vm_memory_monitor:set_vm_memory_high_watermark(0.00001).")
    try:
        # When they end, the one needs no message, and the other is with the broker or has left its own
        station.release(acked)
        station.release(failing)
        assert world.wait_for_end(acked.generation_id).kind == "complete"
        eventually(lambda: station.posts(failing, "failed") >= 1)
        eventually(
            lambda: world.queues()[""] == (0, 1), lambda: str(world.queues()), within_seconds=BLOCKED_TIMEOUT_SECONDS
        )
        time.sleep(BLOCKED_TIMEOUT_SECONDS + 1.0)
        eventually(lambda: world.queues()[""] == (0, 1) or world.queues()[".dead"][0] >= 1)
    finally:
        world.rabbitmq.evaluate("vm_memory_monitor:set_vm_memory_high_watermark(0.4).")

    # Then it is there once the alarm is over; twice perhaps, for what is not confirmed is sent again
    eventually(lambda: world.queues()[".dead"][0] >= 1 and world.queues()[""] == (0, 0), worker.log_tail)
    assert all("410" in reason for _, reason in world.dead_letters())
    station.assert_complete_once(acked)


def test_policy_that_drops_dead_letters_loses_none_of_ours(station: Station, worker: Worker) -> None:
    world = station.world
    trap = {"dead-letter-exchange": "", "dead-letter-routing-key": "nowhere", "overflow": "reject-publish"}
    with policy(world.rabbitmq, "trap", f"^{world.queue}", trap):
        leave_a_dead_letter(station, b"no job")
        assert [body for body, _ in world.dead_letters()] == [b"no job"]
        station.assert_complete_once(station.publish())


def test_a_copy_whose_queue_is_gone_finds_it_made_again(station: Station, worker: Worker) -> None:
    # Given a worker that has published before: a new connection looks for all queues
    world = station.world
    leave_a_dead_letter(station, b"no job")

    delete_queue(station, ".dead")
    world.publish_raw(b"none either")

    world.wait_until_clean(dead=1)
    assert [body for body, _ in world.dead_letters()] == [b"none either"]


# --- Strange wrappings


def test_message_with_headers_undecodable_by_pika_is_done_and_so_are_those_behind_it(
    station: Station, worker: Worker
) -> None:
    world, num_lines = station.world, len(worker.log.read_text().splitlines())
    generation_ids = range(10**6, 10**6 + len(FROM_THE_FIELD))

    for generation_id, encoded in zip(generation_ids, FROM_THE_FIELD.values(), strict=True):
        fields = {"generation_id": generation_id, "prompt": "a fox", "num_inference_steps": 4}
        job = json.dumps({"task_id": str(uuid.uuid4()), "data": fields}).encode()
        world.publish_raw(b"no job", job, properties=Raw(encoded))
    behind = station.publish()

    for generation_id in (*generation_ids, behind.generation_id):
        assert world.wait_for_end(generation_id).kind == "complete"
    world.wait_until_clean(dead=len(FROM_THE_FIELD))
    assert [body for body, _ in world.dead_letters()] == [b"no job"] * len(FROM_THE_FIELD)
    assert worker.events("broker connection lost", first_line=num_lines) == []


# --- The same again, and much of it


def test_the_same_job_five_times_on_two_workers_has_one_end(station: Station, worker: Worker, second: Worker) -> None:
    first = station.publish("hold@3")
    for _ in range(4):
        station.world.publish(task_id=first.task_id, generation_id=first.generation_id, prompt="hold@3")
    eventually(lambda: sum(station.world.queues()[""]) == 5, lambda: str(station.world.queues()))
    station.wait_until_held(first, times=2)
    station.release(first)
    station.assert_complete_once(first, num_runs=2, num_posts=None)
    assert len(distinct_ends(station, first)) == 1
    posts_before = station.posts(first)

    # And once it has ended, not a step and not a word
    for _ in range(3):
        station.world.publish(task_id=first.task_id, generation_id=first.generation_id)
    station.assert_complete_once(first, num_runs=2, num_posts=posts_before)


def test_every_new_try_of_a_generation_has_an_end_of_its_own(station: Station, worker: Worker) -> None:
    world = station.world
    generation_id = world.publish(prompt="fail@2")
    eventually(lambda: len(world.backend.ends(generation_id)) == 1, worker.log_tail)
    world.publish(generation_id=generation_id, prompt="fail@2")
    eventually(lambda: len(world.backend.ends(generation_id)) == 2, worker.log_tail)
    world.publish(generation_id=generation_id)
    eventually(lambda: len(world.backend.ends(generation_id)) == 3, worker.log_tail)

    assert [end.kind for end in world.backend.ends(generation_id)] == ["failed", "failed", "complete"]
    world.wait_until_clean()


@long
def test_a_worker_with_a_long_job_leaves_a_backlog_to_the_others(station: Station, worker: Worker) -> None:
    world = station.world
    held = station.publish_held()
    generation_ids = range(10_000, 10_150)
    world.publish_raw(
        *(
            json.dumps({"task_id": str(uuid.uuid4()), "data": {"generation_id": number, "prompt": "a fox"}}).encode()
            for number in generation_ids
        )
    )
    waiting = len(generation_ids) + 1 - PREFETCH
    eventually(lambda: world.queues()[""] == (waiting, PREFETCH), lambda: str(world.queues()))

    other = station.start_worker(RABBITMQ_PORT=str(world.rabbitmq.port))
    eventually(lambda: world.queues()[""] == (0, PREFETCH), lambda: str(world.queues()))
    station.release(held)

    station.assert_complete_once(held)
    ends = [world.backend.ends(number) for number in generation_ids]
    assert [[call.kind for call in calls] for calls in ends] == [["complete"]] * len(generation_ids)
    other.kill()
