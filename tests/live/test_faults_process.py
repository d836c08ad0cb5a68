"""The worker's own process is killed, stopped, frozen or starved at every point of a job's story."""

import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from examples.parts.ports import free_port
from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.proxy import UP, Sign
from tests.faults.station import (
    DONE,
    POST_OF_COMPLETE,
    QUICK_RETRIES,
    Job,
    Station,
    kills,
    new_station,
    start_light_worker,
)
from tests.support.long import long
from tests.support.paths import DEMO_MODEL
from tests.support.world import HANG_SECONDS, Worker, eventually, new_world, shadow_modules
from worker.exit_code import ExitCode
from worker.jobs.disposition import MAX_RECOVERIES

# The record, written once more to say that the backend has heard.
MARK = Sign(UP, b'"is_delivered": true')
LARGE = {"width": 512, "height": 512}  # nearly 800 kB of PNG
PIPE_BYTES = 4096
CONSTANTS = QUICK_RETRIES | {
    "worker.results.notifier:DELAYS_SECONDS": (0.3, 1.0, 1.0, 1.0),
    "worker.results.notifier:PATIENCE_SECONDS": 0.5,
    "worker.jobs.dispatcher:LEASE_RECHECK_SECONDS": 0.2,
}


@pytest.fixture(scope="module")
def station(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Station]:
    with new_station(rabbitmq, s3_server, tmp_path_factory.mktemp("station")) as made:
        yield made


@pytest.fixture(autouse=True)
def _sound_and_clean(station: Station) -> None:
    station.make_sound()


@pytest.fixture
def worker(station: Station) -> Worker:
    """Return the only worker: one that an earlier test has left alive, or a new one."""
    alive = [one for one in station.world.workers if one.process.poll() is None]
    for one in alive[1:]:
        one.kill()
    return alive[0] if alive and alive[0].get("/health/ready")[0] == 200 else start_worker(station)


def start_worker(station: Station, **env: str) -> Worker:
    """Start a worker; all share one folder of adapters, as workers do that a machine starts one after the other."""
    return station.start_worker(constants=CONSTANTS, CACHE_DIR=str(cache_of(station)), **env)


@pytest.fixture
def alone(station: Station) -> None:
    """Kill every worker but those the test starts itself."""
    for one in station.world.workers:
        one.kill()


def cache_of(station: Station) -> Path:
    return station.world.folder / "cache"


# --- SIGKILL


def in_download(station: Station, worker: Worker) -> Job:
    path = station.world.upload("models/large.safetensors", os.urandom(300_000))
    read = station.sign("GET", "models/large.safetensors")
    station.store.when(read, DONE, do=kills(worker), after_bytes=100_000)
    return station.publish(lora_path=path)


def at_a_step(station: Station, worker: Worker) -> Job:
    job = station.publish_held()
    worker.kill()
    station.release(job)
    return job


def before_the_image(station: Station, worker: Worker) -> Job:
    return killed_when(station, worker, lambda job: [station.put_of_image(job)])


def in_the_image(station: Station, worker: Worker) -> Job:
    job = killed_when(station, worker, lambda job: [station.put_of_image(job)], after_bytes=300_000)
    # Half a picture is none.
    assert station.object_of(job) not in station.world.keys("generations/")
    return job


def behind_the_image(station: Station, worker: Worker) -> Job:
    return killed_when(station, worker, lambda job: [station.put_of_image(job), DONE])


def before_the_record(station: Station, worker: Worker) -> Job:
    return killed_when(station, worker, lambda job: [station.put_of_record(job)])


def behind_the_record(station: Station, worker: Worker) -> Job:
    return killed_when(station, worker, lambda job: [station.put_of_record(job), DONE])


def before_the_webhook(station: Station, worker: Worker) -> Job:
    job = station.publish_held()
    station.backend.when(POST_OF_COMPLETE, do=kills(worker))
    station.release(job)
    return job


def behind_the_webhook(station: Station, worker: Worker) -> Job:
    job = station.publish_held()
    station.backend.when(POST_OF_COMPLETE, DONE, do=kills(worker))
    station.release(job)
    return job


def before_the_mark(station: Station, worker: Worker) -> Job:
    return killed_when(station, worker, lambda _: [MARK])


def before_the_ack(station: Station, worker: Worker) -> Job:
    return killed_when(station, worker, lambda _: [MARK, DONE])


def killed_when(station: Station, worker: Worker, signs: Callable[[Job], list[Sign]], *, after_bytes: int = 0) -> Job:
    """Publish a job whose worker is killed at these signs on the way to the store."""
    job = station.publish_held(**LARGE)
    station.store.when(*signs(job), do=kills(worker), after_bytes=after_bytes)
    station.release(job)
    return job


# How often the job is drawn, and how often the backend is told, the same each time.
POINTS: dict[Callable[[Station, Worker], Job], tuple[int, int]] = {
    in_download: (1, 1),
    at_a_step: (2, 1),
    before_the_image: (2, 1),
    in_the_image: (2, 1),
    behind_the_image: (2, 1),
    before_the_record: (2, 1),
    behind_the_record: (1, 1),
    before_the_webhook: (1, 1),
    behind_the_webhook: (1, 2),
    before_the_mark: (1, 2),
    before_the_ack: (1, 1),
}


# The short form: a recorded end that nobody has heard of, and one that is told a second time.
TELLING = {behind_the_record, behind_the_webhook}


@pytest.mark.parametrize(
    "point",
    [pytest.param(point, marks=[] if point in TELLING else [long], id=point.__name__) for point in POINTS],
)
def test_a_worker_killed_at_any_point_leaves_one_end_and_one_whole_image(
    station: Station, worker: Worker, point: Callable[[Station, Worker], Job]
) -> None:
    job = point(station, worker)
    assert worker.process.wait(HANG_SECONDS) == -signal.SIGKILL

    next_worker = start_worker(station)
    # Counts of queues come late: a job that is still to be settled may look as if it were gone.
    eventually(lambda: len(events_of(next_worker, "job out", job)) == 1, next_worker.log_tail)

    num_runs, num_posts = POINTS[point]
    station.assert_complete_once(job, num_runs=num_runs, num_posts=num_posts)
    uploads = station.world.store.client().list_multipart_uploads(Bucket=station.world.bucket)
    assert uploads.get("Uploads", []) == []


@long
@pytest.mark.usefixtures("alone")
def test_a_worker_killed_while_it_makes_the_png_leaves_one_end(station: Station) -> None:
    worker = start_worker(station, FAULTS_HOLD="watermark.signature:SignedImage.encode_png")
    job = station.publish()
    eventually((station.world.folder / "reached").exists, worker.log_tail)
    worker.kill()

    start_worker(station)

    station.assert_complete_once(job, num_runs=2)


@long
@pytest.mark.usefixtures("alone")
def test_job_that_kills_every_worker_is_given_up_and_reported_to_the_backend(station: Station) -> None:
    world = station.world
    job = station.publish("hold@3")

    def is_held_or_ended(times: int) -> bool:
        return station.num_held(job) == times or bool(world.backend.ends(job.generation_id))

    num_killed = 0
    while not world.backend.ends(job.generation_id):
        # Beside those out of `.recover`: one out of the jobs' own queue, and one that is not counted yet.
        assert num_killed <= MAX_RECOVERIES + 2
        worker = start_worker(station)
        eventually(lambda times=num_killed + 1: is_held_or_ended(times), worker.log_tail)  # type: ignore[misc]
        if not world.backend.ends(job.generation_id):
            worker.kill()
            num_killed += 1

    assert num_killed > MAX_RECOVERIES
    station.assert_failed_once(job, "WORKER_CRASHED")
    world.wait_until_clean(dead=1)
    assert "WORKER_CRASHED" in world.dead_letters()[0][1]


def test_an_engine_that_hangs_dies_with_its_worker_and_ends_no_job(station: Station, worker: Worker) -> None:
    job = station.publish_held()
    engine = worker.engine_pid()
    # Stopped, it sees no closed pipe: the kernel must end it with its parent.
    os.kill(engine, signal.SIGSTOP)
    try:
        worker.kill()
        eventually(lambda: is_gone(engine))
    finally:
        with suppress(ProcessLookupError):
            os.kill(engine, signal.SIGKILL)

    assert station.world.backend.ends(job.generation_id) == []
    station.release(job)
    start_worker(station)
    station.assert_complete_once(job, num_runs=2)


# --- The engine


def test_killed_engine_costs_its_job_a_second_run_and_nothing_else(station: Station, worker: Worker) -> None:
    job = station.publish_held()
    os.kill(worker.engine_pid(), signal.SIGKILL)
    station.wait_until_held(job, times=2)
    station.release(job)

    station.assert_complete_once(job, num_runs=2)
    # By the worker that has had the message all the time
    assert worker.process.poll() is None
    assert [line["attempt"] for line in events_of(worker, "job in", job)] == [1]


@pytest.mark.parametrize("verb", ["poison", pytest.param("break", marks=long)])
def test_a_job_that_ends_the_engine_every_time_fails_alone(station: Station, worker: Worker, verb: str) -> None:
    """By a crash, or by a device that answers nothing any more, as after a sticky CUDA error."""
    restarts_before = worker.metric("darkroom_engine_restarts_total")
    innocents = [station.publish_held()]
    culprit = station.publish(f"{verb}@3")
    innocents.append(station.publish())
    eventually(lambda: station.num_handed(culprit) == station.num_handed(innocents[1]) == 1, worker.log_tail)
    station.release(innocents[0])

    station.world.wait_for_end(culprit.generation_id)
    station.assert_failed_once(culprit, "ENGINE_CRASHED")
    station.world.wait_until_clean(dead=1)
    station.world.dead_letters()
    # Once in company and twice alone
    assert worker.metric("darkroom_engine_restarts_total") - restarts_before == 3
    assert station.num_runs(culprit) == 3
    for job in innocents:
        station.assert_complete_once(job, num_runs=None)
    assert all(len(events_of(worker, "job in", job)) == 1 for job in (culprit, *innocents))


def events_of(worker: Worker, name: str, job: Job) -> list[dict[str, Any]]:
    return [line for line in worker.events(name) if line["task_id"] == job.task_id]


@long
@pytest.mark.usefixtures("alone")
def test_a_job_that_hangs_the_engine_twice_fails_as_timed_out(station: Station) -> None:
    worker = station.start_worker(constants=CONSTANTS | {"inference.process.health:MIN_HANG_SECONDS": 1.0})
    job = station.publish("hang@3")

    station.world.wait_for_end(job.generation_id)
    station.assert_failed_once(job, "JOB_TIMEOUT")
    station.world.wait_until_clean(dead=1)
    station.world.dead_letters()
    eventually(lambda: worker.get("/health/ready")[0] == 200)
    station.assert_complete_once(station.publish())
    worker.kill()


@pytest.mark.usefixtures("alone")
def test_an_engine_that_cannot_load_its_model_ends_the_worker_before_it_takes_a_job(station: Station) -> None:
    job = station.publish()
    model = str(station.world.folder / "nowhere" / "model")
    worker = station.world.start_worker(**station.env(constants=CONSTANTS) | {"MODEL_ID": model})

    assert worker.process.wait(HANG_SECONDS) == ExitCode.ENGINE
    assert "nowhere" in worker.log_tail()
    assert_left_alone(station, job)


@long
@pytest.mark.usefixtures("alone")
def test_a_gpu_that_is_missing_ends_the_worker_before_it_takes_a_job(station: Station) -> None:
    """The real engine: torch sees no GPU where none is visible."""
    job = station.publish()
    worker = station.world.start_worker(DEVICE="cuda", CUDA_VISIBLE_DEVICES="")

    assert worker.process.wait(HANG_SECONDS) == ExitCode.ENGINE
    assert "torch sees no GPU" in worker.log_tail()
    assert_left_alone(station, job)


@long
@pytest.mark.usefixtures("alone")
def test_image_of_nan_is_never_stored(station: Station) -> None:
    """The real engine, with weights that are finite each and overflow in each other's company."""
    weights = load_file(DEMO_MODEL / "adapters" / "neon.safetensors")
    path = station.world.upload(
        "models/overflowing.safetensors",
        save({name: values.astype("float32") * np.float32(1e18) for name, values in weights.items()}),
    )
    worker = station.world.start_worker()
    worker.wait_until_ready()
    job = station.publish(lora_path=path)

    station.assert_failed_once(job, "OUTPUT_INVALID")
    station.world.wait_until_clean()
    assert station.object_of(job) not in station.world.keys("generations/")
    station.assert_complete_once(station.publish(), num_runs=None)
    worker.kill()


def assert_left_alone(station: Station, job: Job) -> None:
    """Assert that the job is where its backend put it, and is done by the next worker."""
    station.world.wait_for_depth(1, 0)
    assert station.world.backend.calls(generation_id=job.generation_id) == []
    start_worker(station)
    station.assert_complete_once(job)


# --- Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=long)])
def test_an_idle_worker_ends_without_delay(station: Station, worker: Worker, number: signal.Signals) -> None:
    started_at = time.monotonic()
    worker.process.send_signal(number)

    assert worker.process.wait(HANG_SECONDS) == 0
    assert time.monotonic() - started_at < 2 * 10  # machines differ tenfold


def test_a_job_that_ends_within_the_grace_is_the_last_one_of_its_worker(station: Station, worker: Worker) -> None:
    running = station.publish_held()
    worker.process.send_signal(signal.SIGTERM)
    eventually(lambda: worker.get("/health/ready")[1] == "stopping\n")
    time.sleep(0.3)
    late = station.publish()
    time.sleep(2.5)  # longer than a worker takes to end that waits for nothing
    assert worker.process.poll() is None
    station.release(running)

    assert worker.process.wait(HANG_SECONDS) == 0
    assert [end.kind for end in station.world.backend.ends(running.generation_id)] == ["complete"]
    # Nobody was given the other one: what was delivered before would come out of another queue.
    station.world.wait_for_depth(1, 0)
    next_worker = start_worker(station)
    station.assert_complete_once(running)
    station.assert_complete_once(late)
    assert [line["queue"] for line in events_of(next_worker, "job in", late)] == [station.world.queue]


@long
@pytest.mark.usefixtures("alone")
def test_job_longer_than_the_grace_is_given_to_another_worker(station: Station) -> None:
    worker = start_worker(station, SHUTDOWN_GRACE_SECONDS="6")
    job = station.publish_held()
    started_at = time.monotonic()
    worker.process.send_signal(signal.SIGTERM)

    assert worker.process.wait(HANG_SECONDS) == 0
    assert time.monotonic() - started_at < 60
    eventually(lambda: sum(ready for ready, _ in station.world.queues().values()) == 1)
    assert station.world.backend.calls("failed", job.generation_id) == []
    station.release(job)
    start_worker(station)
    station.assert_complete_once(job, num_runs=2)


def test_a_second_interrupt_ends_a_busy_worker_at_once(station: Station, worker: Worker) -> None:
    job = station.publish_held()
    engine = worker.engine_pid()
    worker.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    worker.process.send_signal(signal.SIGINT)

    assert worker.process.wait(60) == 130
    eventually(lambda: is_gone(engine))
    station.release(job)
    start_worker(station)
    station.assert_complete_once(job, num_runs=2)


@long
@pytest.mark.skipif(os.geteuid() != 0, reason="a PID namespace needs root")
@pytest.mark.usefixtures("alone")
def test_worker_as_pid_1_ends_by_sigterm_and_leaves_no_zombie(station: Station) -> None:
    with started(station, prefix=["unshare", "--pid", "--fork", "--mount-proc"]) as outer:
        outer.wait_until_ready()
        (inner,) = children_of(outer.process.pid)
        (engine,) = children_of(inner)
        os.kill(engine, signal.SIGKILL)
        eventually(lambda: children_of(inner) != [engine] and outer.get("/health/ready")[0] == 200)
        assert [state_of(child) for child in children_of(inner) if state_of(child) == "Z"] == []
        station.assert_complete_once(station.publish())

        os.kill(inner, signal.SIGTERM)
        assert outer.process.wait(HANG_SECONDS) == 0


def children_of(pid: int) -> list[int]:
    found = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return [int(child) for child in found.split()]


def is_gone(pid: int) -> bool:
    """Return whether the process has ended, reaped or not."""
    return not Path(f"/proc/{pid}").exists() or state_of(pid) == "Z"


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@long
@pytest.mark.usefixtures("alone")
def test_a_worker_frozen_for_long_finds_that_its_job_has_ended(station: Station) -> None:
    frozen = start_worker(station)
    job = station.publish_held()
    other = station.start_worker(CACHE_DIR=str(station.world.folder / "other"))
    frozen.process.send_signal(signal.SIGSTOP)
    try:
        # The broker gives a worker up that it hears nothing of.
        station.wait_until_held(job, times=2)
        station.release(job)
        eventually(lambda: station.is_marked(job), other.log_tail)
        other.kill()
    finally:
        frozen.process.send_signal(signal.SIGCONT)

    # The thawed one's engine had drawn it as well.
    eventually(lambda: frozen.metric("darkroom_jobs_total", outcome="complete") == 1, frozen.log_tail)
    station.assert_complete_once(job, num_runs=2, num_posts=1)


# --- The host


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield
    finally:
        # Lazily: where the test failed, a worker may still have its cache there.
        subprocess.run(["umount", "--lazy", folder], check=True)


@long
@pytest.mark.usefixtures("alone")
def test_a_full_disk_leaves_no_half_file_and_the_job_to_another_worker(station: Station) -> None:
    path = station.world.upload("models/too-large.safetensors", os.urandom(2_000_000))
    small = station.world.folder / "small"
    with mounted(small, "size=1m"):
        worker = station.start_worker(constants=CONSTANTS, CACHE_DIR=str(small))
        job = station.publish(lora_path=path)
        eventually(lambda: station.world.queues().get(".retry.1") == (1, 0), worker.log_tail)
        assert list(small.iterdir()) == []
        worker.kill()

    start_worker(station)
    station.assert_complete_once(job)


@pytest.mark.usefixtures("alone")
def test_a_cache_that_cannot_be_written_ends_the_worker_before_it_takes_a_job(station: Station) -> None:
    folder = station.world.folder / "read-only"
    job = station.publish(lora_path=station.world.upload("models/any.safetensors", b"x" * 1000))
    with mounted(folder, "size=1m,ro"):
        worker = station.world.start_worker(**station.env(constants=CONSTANTS) | {"CACHE_DIR": str(folder)})
        assert worker.process.wait(HANG_SECONDS) == ExitCode.SETTINGS
        assert "CACHE_DIR" in worker.log_tail()

    assert_left_alone(station, job)


@long
def test_a_worker_without_a_descriptor_to_spare_ends_no_job_and_goes_on_once_it_has_some(
    station: Station, worker: Worker
) -> None:
    pid = worker.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))  # what is open stays open
    try:
        job = station.publish()
        eventually(lambda: len(events_of(worker, "job broke off", job)) == 1, worker.log_tail)
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)

    station.assert_complete_once(job)
    assert [line["attempt"] for line in events_of(worker, "job in", job)] == [1, 2]
    assert worker.get("/health/ready")[0] == 200


@long
@pytest.mark.parametrize("seconds", [3600, -3600])
def test_a_clock_that_jumps_changes_no_wait_and_no_end(station: Station, worker: Worker, seconds: int) -> None:
    # Given a job in the middle, and the end of another in the outbox
    world = station.world
    world.backend.answer("complete", 500, times=3)
    parked = station.publish()
    eventually(lambda: sum(world.queues()[".outbox"]) == 1, lambda: str(world.queues()))
    drawn = station.publish_held()

    station.set_clock(seconds)
    station.release(drawn)

    jumped_at = time.monotonic()
    for job in (drawn, parked):
        station.assert_complete_once(job, num_posts=None)
    assert time.monotonic() - jumped_at < 60
    assert worker.get("/health/ready")[0] == 200


@long
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("is_closed", [False, True], ids=["blocked", "closed"])
def test_blocked_log_delays_no_job_and_no_end(station: Station, is_closed: bool) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    if is_closed:
        os.close(reader)
    with started(station, output=writer) as worker:
        os.close(writer)
        worker.wait_until_ready()
        jobs = [station.publish() for _ in range(20)]
        for job in jobs:
            station.world.wait_for_end(job.generation_id)
        station.world.wait_until_clean()
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(HANG_SECONDS) == 0
    if not is_closed:
        os.close(reader)


class WrappedWorker(Worker):
    """A worker behind another command, or with another standard output."""

    def __init__(self, env: dict[str, str], log: Path, command: list[str], output: int | None) -> None:
        self.port = int(env["METRICS_PORT"])
        self.log = log
        log.touch()
        with log.open("wb") as sink:
            out = sink if output is None else output
            self.process = subprocess.Popen(command, env=env, cwd=log.parent, stdout=out, stderr=out)


@contextmanager
def started(station: Station, *, prefix: list[str] | None = None, output: int | None = None) -> Iterator[Worker]:
    """Start a worker by `prefix`, which writes to the descriptor `output`; ready when the caller has seen it so."""
    world = station.world
    own = {
        "PATH": os.environ["PATH"],
        "CACHE_DIR": str(cache_of(station)),
        "METRICS_PORT": str(free_port()),
    }
    command = [*(prefix or []), str(Path(sys.executable).parent / "darkroom"), "run"]
    env = world.env() | station.env(constants=CONSTANTS) | own
    worker = WrappedWorker(env, world.folder / f"worker-{len(world.workers) + 1}.log", command, output)
    world.workers.append(worker)
    try:
        yield worker
    finally:
        for child in children_of(worker.process.pid) if worker.process.poll() is None else []:
            os.kill(child, signal.SIGKILL)
        worker.kill()


def test_a_worker_started_in_a_folder_of_modules_with_its_own_names_draws(
    rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path: Path
) -> None:
    shadow_modules(tmp_path)
    with new_world(rabbitmq, s3_server, tmp_path) as world:
        start_light_worker(world)

        assert world.wait_for_end(world.publish()).kind == "complete"
