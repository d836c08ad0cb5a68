"""The way to the broker breaks, hangs or lies: nothing is lost, and nothing has an effect twice."""

import os
import signal
import time
import uuid
from collections.abc import Iterator

import pika
import pytest

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.proxy import DOWN, Link, Proxy, Sign
from tests.faults.station import HEARTBEAT_SECONDS, Job, Station, long, new_station
from tests.world import Worker, eventually

pytestmark = long  # `make faults` runs them

# After so long the broker has given up a peer that it hears nothing of.
GIVEN_UP_SECONDS = 3 * HEARTBEAT_SECONDS
# pika looks every heartbeat and five seconds whether anything has come, and gives up at the second time.
NOTICED_SECONDS = 2 * (HEARTBEAT_SECONDS + 5)
# How long the worker waits for a broker that confirms nothing; five by default.
BLOCKED_SECONDS = 1.0


@pytest.fixture(scope="module")
def station(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Station]:
    with new_station(rabbitmq, s3_server, tmp_path_factory.mktemp("station")) as made:
        made.start_worker(constants={"worker.broker:BLOCKED_TIMEOUT_SECONDS": BLOCKED_SECONDS})
        yield made


@pytest.fixture
def worker(station: Station) -> Worker:
    """One worker for all tests, after each of which it must be as good as new."""
    station.make_sound()
    worker, *others = station.world.workers
    for other in others:
        other.kill()
    eventually(lambda: worker.get("/health/ready")[0] == 200, 30, worker.log_tail)
    station.world.wait_until_clean()
    return worker


@pytest.fixture
def second(station: Station, worker: Worker) -> Iterator[Worker]:
    """Another worker, which reaches the broker directly."""
    made = station.start_worker(RABBITMQ_PORT=str(station.world.rabbitmq.port))
    yield made
    made.kill()


def num_adopted(worker: Worker) -> float:
    return worker.metric("darkroom_jobs_total", outcome="adopted")


def publish_followed(station: Station) -> tuple[Job, list[Link]]:
    """A held job, and the connection that brought it."""
    links: list[Link] = []
    task_id = str(uuid.uuid4())
    station.broker.when(Sign(DOWN, task_id.encode()), do=links.append)
    job = Job(task_id, station.world.publish(task_id=task_id, prompt="hold@3"))
    station.wait_until_held(job)
    return job, links


def delete_queue(station: Station, suffix: str = "") -> None:
    connection = pika.BlockingConnection(pika.URLParameters(station.world.rabbitmq.url))
    connection.channel().queue_delete(f"{station.world.queue}{suffix}")
    connection.close()


def test_a_reset_in_mid_job_is_adopted_and_no_tag_of_the_lost_session_is_sent(station: Station, worker: Worker) -> None:
    # Given a job in the middle, and the connection that it came by
    job, links = publish_followed(station)
    adopted_before, connections_before = num_adopted(worker), station.broker.num_connections

    # When that is reset, the same job comes once more by a new one, within two seconds
    station.broker.reset(*links)
    eventually(lambda: num_adopted(worker) == adopted_before + 1, 2, worker.log_tail)
    assert station.broker.num_connections == connections_before + 1
    station.release(job)

    # Then it is drawn once, and the dead delivery's tag costs the new connection nothing
    station.assert_complete_once(job)
    time.sleep(1)
    assert station.broker.num_connections == connections_before + 1


@long
def test_a_broker_that_falls_silent_delays_no_end_and_has_nothing_drawn_twice(station: Station, worker: Worker) -> None:
    job = station.publish_held()
    connections_before = station.broker.num_connections
    os.kill(station.world.rabbitmq.pid, signal.SIGSTOP)
    try:
        # The picture is stored and the backend told while no ack can be heard.
        station.release(job)
        station.world.wait_for_end(job.generation_id, 5)
        # The silence is noticed, and a handshake without an answer is not waited for either.
        eventually(lambda: "broker" in worker.get("/health/ready")[1], NOTICED_SECONDS + 2, worker.log_tail)
        eventually(lambda: station.broker.num_connections >= connections_before + 1, 7, worker.log_tail)
    finally:
        os.kill(station.world.rabbitmq.pid, signal.SIGCONT)

    station.assert_complete_once(job)


def test_a_job_behind_a_black_hole_goes_to_another_worker_and_one_end_wins(station: Station, worker: Worker) -> None:
    # Given a worker that goes on behind a connection without an end, and another one
    job = station.publish_held()
    other = station.start_worker(RABBITMQ_PORT=str(station.world.rabbitmq.port))
    station.broker.black_hole()
    fell_silent_at = time.monotonic()

    # When the broker gives the job to that
    station.wait_until_held(job, times=2)
    assert time.monotonic() - fell_silent_at < GIVEN_UP_SECONDS + 4
    station.release(job)

    # Then both finish it, and it has one end
    eventually(lambda: station.num_finished(job) == 2, 10)
    station.assert_complete_once(job, num_runs=2, num_posts=None)
    other.kill()
    station.broker.pass_on()
    station.broker.reset()


@long
def test_a_slow_link_costs_time_and_no_connection(station: Station, worker: Worker) -> None:
    job, links = publish_followed(station)
    adopted_before = num_adopted(worker)
    station.broker.delay(1.0)
    time.sleep(GIVEN_UP_SECONDS + 1)
    station.release(job)

    station.assert_complete_once(job)
    assert not links[0].is_closed
    assert num_adopted(worker) == adopted_before


def test_a_handshake_without_an_answer_is_given_up_and_begun_anew(
    station: Station, worker: Worker, rabbitmq: RabbitMQ
) -> None:
    with Proxy(rabbitmq.port) as silent:
        silent.black_hole()
        env = station.env(constants={"worker.broker:STACK_TIMEOUT_SECONDS": 1.0})
        other = station.world.start_worker(**env | {"RABBITMQ_PORT": str(silent.port)})
        eventually(lambda: silent.num_connections >= 3, 10, other.log_tail)
        assert other.get("/health/live")[0] == 200

        silent.pass_on()
        other.wait_until_ready()
        other.kill()


def test_a_queue_deleted_in_mid_job_is_there_again_and_the_job_ends_once(station: Station, worker: Worker) -> None:
    job = station.publish_held()
    delete_queue(station)
    eventually(lambda: station.world.queues().get("") == (0, 0), 5, worker.log_tail)
    station.release(job)

    station.assert_complete_once(job)
    station.assert_complete_once(station.publish())


def test_in_an_alarm_acks_go_through_and_what_must_be_published_is_not_lost(station: Station, worker: Worker) -> None:
    world = station.world
    # Given a worker that has published before: of a new connection the broker takes one message even in an alarm
    world.publish_raw(b"no job")
    world.wait_until_clean(dead=1)
    world.dead_letters()
    # And two jobs under way, one of which will have to leave a dead letter
    world.backend.answer("failed", 410)
    acked = station.publish_held()
    buried = station.publish("hold@3 fail@4")
    eventually(lambda: world.queues()[""] == (0, 2), 5, lambda: str(world.queues()))
    world.rabbitmq.ctl("set_vm_memory_high_watermark", "0.00001")
    try:
        # When they end, the one needs no message, and the other is with the broker or has left its own
        station.release(acked)
        station.release(buried)
        assert world.wait_for_end(acked.generation_id).kind == "complete"
        eventually(lambda: station.posts(buried, "failed") >= 1, 10)
        eventually(lambda: world.queues()[""] == (0, 1), BLOCKED_SECONDS, lambda: str(world.queues()))
        time.sleep(BLOCKED_SECONDS + 1.0)
        eventually(lambda: world.queues()[""] == (0, 1) or world.queues()[".dead"][0] >= 1, 1)
    finally:
        world.rabbitmq.ctl("set_vm_memory_high_watermark", "0.4")

    # Then it is there once the alarm is over; twice perhaps, for what is not confirmed is sent again
    eventually(lambda: world.queues()[".dead"][0] >= 1 and world.queues()[""] == (0, 0), 10, worker.log_tail)
    assert all("410" in reason for _, reason in world.dead_letters())
    station.assert_complete_once(acked)


def test_a_policy_that_drops_dead_letters_takes_nothing_from_ours(station: Station, worker: Worker) -> None:
    world = station.world
    trap = '{"dead-letter-exchange":"","dead-letter-routing-key":"nowhere","overflow":"reject-publish"}'
    world.rabbitmq.ctl("set_policy", "trap", f"^{world.queue}", trap)
    try:
        world.publish_raw(b"no job")
        world.wait_until_clean(dead=1)
        assert [body for body, _ in world.dead_letters()] == [b"no job"]
        station.assert_complete_once(station.publish())
    finally:
        world.rabbitmq.ctl("clear_policy", "trap")


def test_a_copy_whose_queue_is_gone_finds_it_made_again(station: Station, worker: Worker) -> None:
    # Given a worker that has published before: a new connection looks for all queues
    world = station.world
    world.publish_raw(b"no job")
    world.wait_until_clean(dead=1)

    delete_queue(station, ".dead")
    world.publish_raw(b"none either")

    world.wait_until_clean(dead=1)
    assert [body for body, _ in world.dead_letters()] == [b"none either"]


def test_the_same_job_five_times_on_two_workers_has_one_end(station: Station, worker: Worker, second: Worker) -> None:
    first = station.publish("hold@3")
    for _ in range(4):
        station.world.publish(task_id=first.task_id, generation_id=first.generation_id, prompt="hold@3")
    eventually(lambda: sum(station.world.queues()[""]) == 5, 5, lambda: str(station.world.queues()))
    station.wait_until_held(first, times=2)
    station.release(first)
    station.assert_complete_once(first, num_runs=2, num_posts=None)
    posts_before = station.posts(first)

    # And once it has ended, not a step and not a word
    for _ in range(3):
        station.world.publish(task_id=first.task_id, generation_id=first.generation_id)
    station.assert_complete_once(first, num_runs=2, num_posts=posts_before)


def test_a_new_try_of_a_failed_generation_has_an_end_of_its_own(station: Station, worker: Worker) -> None:
    world = station.world
    generation_id = world.publish(lora_path="models/missing.safetensors")
    assert world.wait_for_end(generation_id).kind == "failed"

    world.publish(generation_id=generation_id)

    eventually(lambda: len(world.backend.ends(generation_id)) == 2, 15, worker.log_tail)
    assert [end.kind for end in world.backend.ends(generation_id)] == ["failed", "complete"]
    world.wait_until_clean()
