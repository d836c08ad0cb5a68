"""Hostile inputs through a whole worker: each its answer at once, nothing touched, and the next job as good as before.

`make test` takes one variant of each class and a few fuzzed messages; `make hostile` all of them and 2000. What
differs between `make` targets is how much, never what is looked at.
"""

import base64
import dataclasses
import json
import logging
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pika
import psutil
import pytest
from rich.console import Console
from rich.table import Table

from config.model import ModelSettings
from config.store import StoreSettings
from examples.parts.backend import Backend
from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.hostile.fuzzing import SEED, fuzzed_message
from tests.hostile.inputs import (
    BUCKET,
    CANARY,
    CANARY_FOLDER,
    CLASSES,
    DEAD,
    ID,
    IGNORED,
    OTHER_BUCKET,
    PLAIN,
    RUNS,
    STORE,
    STYLED,
    TASK,
    HostileClass,
    Variant,
    demo_adapter,
    torch_zip,
)
from tests.hostile.kinds import KIND_CLASSES
from tests.hostile.raw_properties import Raw
from tests.support.paths import SIGNATURE
from tests.support.servers.broker_admin import add_user
from tests.support.world import Worker, World, eventually
from worker.jobs.settler import MAX_DEAD_BODY_BYTES
from worker.messages.decoder import decode, rules_from
from worker.messages.job import Job, JobRejected, Undecodable, resolve_size
from worker.messages.rules import MAX_REASON_CHARS

logger = logging.getLogger(__name__)

IS_LONG = os.environ.get("HOSTILE_VARIANTS") == "all"
NUM_VARIANTS = None if IS_LONG else 1
CONTROL_EVERY = 1 if IS_LONG else 4  # classes between two jobs that are beyond doubt
NUM_FUZZED = int(os.environ.get("HOSTILE_FUZZED", "30"))

# The figure to reach is a second, which the table shows; a neighbour's load makes several, and a fault makes minutes.
ANSWER_SECONDS = 120.0
MAX_GROWTH_MB = 100.0
BASE_SIZE = 128
MAX_FUZZED_WORK = 2 * BASE_SIZE**2  # pixels times steps
BUGS = ("the decoder failed", "unforeseen error", "a job thread failed", "a thread failed", "engine fault")


class Listener:
    """A server to which no connection is to be made."""

    def __init__(self) -> None:
        self.num_connections = 0
        self._socket = socket.create_server(("0.0.0.0", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._count, name="listener", daemon=True).start()

    def _count(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.num_connections += 1
            connection.close()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class BrokerConnection:
    """The test's own connection: publishes with any property, and receives dead letters at once."""

    def __init__(self, world: World) -> None:
        self._queue = world.queue
        self._connection = pika.BlockingConnection(pika.URLParameters(world.rabbitmq.url + "?heartbeat=0"))
        self._channel = self._connection.channel()
        self.letters: list[bytes] = []
        self.reasons: list[str] = []
        self._channel.basic_consume(f"{world.queue}.dead", self._take, auto_ack=True)

    def _take(self, _channel: Any, _method: Any, properties: Any, body: bytes) -> None:
        self.letters.append(body)
        self.reasons.append(properties.headers["x-darkroom-reason"])

    def publish(self, body: bytes, *, exchange: str = "", raw: bytes | None = None, **properties: Any) -> None:
        wrapping = pika.BasicProperties(**{"delivery_mode": 2, **properties}) if raw is None else Raw(raw)
        self._channel.basic_publish(exchange, "" if exchange else self._queue, body, wrapping)

    def listen(self, seconds: float = 0.005) -> None:
        self._connection.process_data_events(time_limit=seconds)

    def close(self) -> None:
        self._connection.close()


class Memory(NamedTuple):
    """Resident memory in MB: of the supervisor and of the engine, now and at most since the test began."""

    supervisor: float
    engine: float
    supervisor_peak: float
    engine_peak: float


class Answer(NamedTuple):
    """What came of a message, and the seconds from its publishing to that."""

    word: str
    text: str
    seconds: float


@dataclasses.dataclass
class Row:
    """What came of a class."""

    name: str
    seconds: list[float]
    grown: tuple[float, float]


class Site:
    """One worker whose secrets are all canaries, and everything that looks at it from outside."""

    def __init__(self, world: World, worker: Worker, secrets: Mapping[str, str]) -> None:
        self.world = world
        self.worker = worker
        self.secrets = secrets
        self.listener = Listener()
        self.connection = BrokerConnection(world)
        self.rows: list[Row] = []
        self._s3 = world.store.client()
        self._uploaded: set[str] = set()
        self._images: dict[str, bytes] = {}
        self.engine_pid = worker.engine_pid()

    def warm_up(self) -> None:
        """Let the caches, the bank and the allocator come to their size; after this, memory counts."""
        self.upload("models/neon.safetensors", demo_adapter())
        self.upload("signatures/a.png", SIGNATURE.read_bytes())
        for fields in ({}, STYLED, {"signature_path": "signatures/a.png"}, {"prompt": "a fox, " * 60}, {}):
            self.draw(fields)
        self.image_of({})
        for pid in (self.worker.process.pid, self.engine_pid):
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak counts from here on
        self.memory_before = self.memory()

    def upload(self, key: str, content: bytes) -> None:
        if key not in self._uploaded:
            self._s3.put_object(Bucket=self.world.bucket, Key=key, Body=content)
            self._uploaded.add(key)

    def record(self, key: str) -> bytes:
        """Return an object's content and its metadata."""
        found = self._s3.get_object(Bucket=self.world.bucket, Key=key)
        return bytes(found["Body"].read()) + json.dumps(found["Metadata"]).encode()

    def draw(self, fields: Mapping[str, Any]) -> bytes:
        """Draw the image of a valid job."""
        generation_id = self.world.publish(**PLAIN | dict(fields))
        end = self.world.wait_for_end(generation_id)
        assert end.kind == "complete", end.body
        return self.world.pixels(generation_id)

    def image_of(self, fields: Mapping[str, Any]) -> bytes:
        """Draw the same once, and keep it."""
        key = json.dumps(fields, sort_keys=True)
        if key not in self._images:
            self._images[key] = self.draw(fields)
        return self._images[key]

    def num_steps(self) -> float:
        # The last step of a job is counted a moment after its end is told.
        eventually(lambda: self.worker.metric("darkroom_lanes") == 0, self.worker.log_tail)
        return self.worker.metric("darkroom_denoise_lane_steps_total")

    def memory(self) -> Memory:
        resident = [psutil.Process(pid).memory_info().rss / 1e6 for pid in (self.worker.process.pid, self.engine_pid)]
        peaks = [_status_mb(pid, "VmHWM") for pid in (self.worker.process.pid, self.engine_pid)]
        return Memory(*resident, *peaks)

    def ask(self, variant: Variant) -> Answer:
        """Publish the variant and wait for what comes of it."""
        for key, make in variant.files.items():
            self.upload(key, make())
        generation_id = self.world.next_generation_id
        self.world.next_generation_id += 1
        body = variant.body_for(self._values(generation_id))
        num_calls, num_ignored = len(self.world.backend.calls()), self._num_ignored()
        exchange = f"{self.world.queue}.cancel" if variant.answer == IGNORED else ""

        self.connection.publish(body, exchange=exchange, **variant.properties)
        published_at = time.time()
        while time.time() < published_at + ANSWER_SECONDS:
            self.connection.listen()
            if ends := self.world.backend.ends(generation_id):
                return self._ended(generation_id, ends[0], published_at)
            if self.connection.letters:
                return self._dead_lettered(body, num_calls, published_at)
            if variant.answer == IGNORED and self._num_ignored() > num_ignored:
                return Answer(IGNORED, "", time.time() - published_at)
        raise AssertionError(f"no answer within {ANSWER_SECONDS} s\n{self.worker.log_tail()}")

    def _values(self, generation_id: int) -> dict[str, str]:
        return {
            ID: str(generation_id),
            TASK: str(uuid.uuid4()),
            BUCKET: self.world.bucket,
            STORE: self.world.store.endpoint_url.removeprefix("http://"),
            CANARY: str(self.listener.port),
        }

    def _ended(self, generation_id: int, end: Any, published_at: float) -> Answer:
        seconds = max(0.0, end.received_at - published_at)
        task_id = end.headers["webhook-id"].partition(":")[0]
        assert str(uuid.UUID(task_id)) == task_id
        assert len(self.world.backend.ends(generation_id)) == 1
        if end.kind == "complete":
            return Answer(RUNS, "", seconds)
        assert end.body["retry_count"] == 0
        return Answer(end.body["error_code"], end.body["error_message"], seconds)

    def _dead_lettered(self, body: bytes, num_calls: int, published_at: float) -> Answer:
        seconds = max(0.0, time.time() - published_at)
        (letter,) = self.connection.letters
        self.connection.letters.clear()
        assert letter == body[:MAX_DEAD_BODY_BYTES]
        assert len(self.world.backend.calls()) == num_calls, "nobody is told of a message without an id to trust"
        return Answer(DEAD, self.connection.reasons[-1], seconds)

    def _num_ignored(self) -> int:
        return self.worker.log.read_bytes().count(b'"cancel order ignored"')

    def assert_unharmed(self) -> None:
        """Assert that no process has ended and the log has no unforeseen error."""
        assert self.worker.process.poll() is None
        assert self.worker.engine_pid() == self.engine_pid
        log = self.worker.log.read_text()
        assert [bug for bug in BUGS if bug in log] == []
        assert '"CRITICAL"' not in log

    def report(self) -> dict[str, Any]:
        """Return what the run has measured."""
        seconds = [one for row in self.rows for one in row.seconds]
        memory = self.memory()
        return {
            "classes": len(self.rows),
            "variants": len(seconds),
            "median_seconds": round(statistics.median(seconds), 3),
            "slowest_seconds": round(max(seconds), 3),
            "over_a_second": sum(one > 1 for one in seconds),
            "grown_mb": [round(now - was) for now, was in zip(memory, self.memory_before, strict=True)],
        }

    def table(self) -> Table:
        table = Table("class", "variants", "median ms", "slowest ms", "memory since the start, MB: supervisor, engine")
        for row in self.rows:
            spread = statistics.median(row.seconds), max(row.seconds)
            numbers = [f"{one * 1000:.0f}" for one in spread] + ["{:+.0f}, {:+.0f}".format(*row.grown)]
            table.add_row(row.name, str(len(row.seconds)), *numbers)
        return table


def _status_mb(pid: int, name: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1000


def canary_secret() -> str:
    return f"canary{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def site(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("hostile")
    signing = base64.b64encode(uuid.uuid4().bytes * 2).decode()
    secrets = {
        "INTERNAL_API_TOKEN": canary_secret(),
        "RABBITMQ_PASS": canary_secret(),
        "WEBHOOK_SIGNING_SECRET": f"whsec_{signing}",
        "AWS_SECRET_ACCESS_KEY": s3_server.secret_access_key,
    }
    user = f"worker-{uuid.uuid4().hex[:8]}"
    add_user(rabbitmq, user, secrets["RABBITMQ_PASS"])
    # Another process would unpickle these too, if anybody did.
    Path(f"{CANARY_FOLDER}-pickles").mkdir()
    (Path(f"{CANARY_FOLDER}-pickles") / "adapter_model.bin").write_bytes(torch_zip())

    with Backend(token=secrets["INTERNAL_API_TOKEN"]) as backend:
        names = [f"hostile-{uuid.uuid4().hex[:12]}" for _ in range(2)]
        world = World(rabbitmq, s3_server, backend, *names, folder)
        for bucket in (world.bucket, OTHER_BUCKET):
            s3_server.make_bucket(bucket)
        s3_server.client().put_object(Bucket=OTHER_BUCKET, Key="a", Body=b"")
        worker = world.start_worker(**secrets, RABBITMQ_USER=user, LOG_LEVEL="DEBUG")
        try:
            worker.wait_until_ready()
            made = Site(world, worker, secrets)
            made.warm_up()
            yield made
            made.listener.close()
        finally:
            world.stop()
            shutil.rmtree(f"{CANARY_FOLDER}-pickles")


@pytest.mark.parametrize("hostile", (*CLASSES, *KIND_CLASSES), ids=lambda hostile: hostile.name)
def test_every_variant_gets_its_answer_and_the_next_job_its_image(site: Site, hostile: HostileClass) -> None:
    row = Row(hostile.name, [], (0.0, 0.0))
    for name, variant in islice(hostile.variants.items(), NUM_VARIANTS):
        expected = None if variant.same_as is None else site.image_of(variant.same_as)
        steps_before = site.num_steps()

        answer = site.ask(variant)

        assert answer.word == variant.answer, f"{name}: {answer}"
        assert answer.text.isprintable(), f"{name}: {answer}"
        assert len(answer.text) <= MAX_REASON_CHARS + 100, f"{name}: {answer}"
        if variant.answer != RUNS:
            assert site.num_steps() == steps_before, f"{name} was drawn"
        if expected is not None:
            last = site.world.next_generation_id - 1
            assert site.world.pixels(last) == expected, f"{name} is another picture"
        row.seconds.append(answer.seconds)

    if hostile.number % CONTROL_EVERY == 0:
        assert site.draw({}) == site.image_of({})
    now, before = site.memory(), site.memory_before
    row.grown = (now.supervisor - before.supervisor, now.engine - before.engine)
    site.rows.append(row)
    assert site.listener.num_connections == 0
    assert not CANARY_FOLDER.exists()


class Fuzzed(NamedTuple):
    """Messages with the answers that the decoder alone foretells."""

    bodies: list[bytes]
    asked: dict[str, Job | JobRejected]  # by task
    dead: list[bytes]
    num_left_out: int


def fuzzed_messages(site: Site) -> Fuzzed:
    """Build as many as the options say, without those of more work than their answer is worth."""
    env = site.world.env()
    rules = rules_from(
        ModelSettings(),
        StoreSettings(**{name: value for name, value in env.items() if name.startswith("AWS_")}),  # type: ignore[arg-type]
    )
    fuzzed = Fuzzed([], {}, [], 0)
    num_left_out = 0
    for number in range(NUM_FUZZED):
        rng = random.Random(f"{SEED} live {number}")
        body = fuzzed_message(rng, generation_id=10**6 + number, bucket=site.world.bucket)
        try:
            asked: Job | JobRejected = decode(body, rules)
        except JobRejected as rejected:
            asked = rejected
        except Undecodable:
            fuzzed.dead.append(body)
            fuzzed.bodies.append(body)
            continue
        if asked.task_id in fuzzed.asked or (isinstance(asked, Job) and _work_of(asked) > MAX_FUZZED_WORK):
            num_left_out += 1
            continue
        fuzzed.asked[asked.task_id] = asked
        fuzzed.bodies.append(body)
    return fuzzed._replace(num_left_out=num_left_out)


def _work_of(job: Job) -> int:
    width, height = resolve_size(job, base_size=BASE_SIZE, size_multiple=8)
    return width * height * (job.num_inference_steps or 50) * job.num_images


def test_every_fuzzed_message_is_answered_once_as_the_decoder_predicts(site: Site) -> None:
    fuzzed = fuzzed_messages(site)
    started_at = time.monotonic()

    for body in fuzzed.bodies:
        site.connection.publish(body)

    def ends() -> dict[str, list[Any]]:
        received: dict[str, list[Any]] = {}
        for call in site.world.backend.calls():
            task_id, _, kind = call.headers["webhook-id"].partition(":")
            if task_id in fuzzed.asked and kind in ("complete", "failed"):
                received.setdefault(task_id, []).append(call)
        return received

    deadline = started_at + 10 * (30 + len(fuzzed.bodies) / 4)
    while len(site.connection.letters) < len(fuzzed.dead) or ends().keys() != fuzzed.asked.keys():
        assert time.monotonic() < deadline, f"{len(ends())} of {len(fuzzed.asked)}\n{site.worker.log_tail()}"
        site.connection.listen(0.2)
    site.world.wait_until_clean()

    letters = sorted(site.connection.letters)
    site.connection.letters.clear()
    assert letters == sorted(body[:MAX_DEAD_BODY_BYTES] for body in fuzzed.dead)
    received = ends()
    assert {task_id for task_id, calls in received.items() if len(calls) > 1} == set()
    wrong = {
        task_id: calls[0].body
        for task_id, calls in received.items()
        if isinstance(asked := fuzzed.asked[task_id], JobRejected) and calls[0].body.get("error_code") != asked.code
    }
    assert wrong == {}
    site.assert_unharmed()
    assert site.draw({}) == site.image_of({})
    assert site.listener.num_connections == 0
    counted = {"dead letters": len(letters), "received": len(received), "left out": fuzzed.num_left_out}
    logger.warning("fuzzed: %s in %.1f s", json.dumps(counted), time.monotonic() - started_at)


def test_no_process_crashed_and_memory_hardly_grew(site: Site) -> None:
    site.world.wait_until_clean()
    site.assert_unharmed()

    report = site.report()

    with (site.world.folder / "table.txt").open("w") as sink:
        Console(file=sink, width=140).print(site.table())
    logger.warning("\n%s\n%s", (site.world.folder / "table.txt").read_text(), json.dumps(report))
    supervisor, engine, *_peaks = report["grown_mb"]
    assert supervisor < MAX_GROWTH_MB
    assert engine < MAX_GROWTH_MB


def test_each_event_was_one_short_line_of_json_whatever_the_prompts_held(site: Site) -> None:
    lines = site.worker.log.read_bytes().splitlines()

    assert all(isinstance(json.loads(line), dict) for line in lines)
    assert max(map(len, lines)) <= 8192


def test_no_secret_is_in_any_log_webhook_dead_letter_record_metric_or_process_list(site: Site) -> None:
    world, worker = site.world, site.worker
    # Given also a broker that cuts every connection, a backend in trouble, and a command that meets wrong secrets
    world.backend.answer("complete", 500, times=1)
    site.connection.close()
    world.rabbitmq.close_connections()
    wrong = {name: f"{value}x" for name, value in site.secrets.items()}
    checked = check(world, wrong | {"WEBHOOK_SIGNING_SECRET": ""}) + check(world, wrong)
    assert site.draw({}) == site.image_of({})

    # When everything that leaves the worker is gathered
    family = [worker.process.pid, *(child.pid for child in psutil.Process(worker.process.pid).children(recursive=True))]
    gathered = {
        "process list": b"".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in family),
        "engine's environment": Path(f"/proc/{site.engine_pid}/environ").read_bytes(),
        "metrics": worker.get("/metrics")[1].encode(),
        "health": worker.get("/health/ready")[1].encode(),
        "status": worker.get("/status.json")[1].encode(),
        "webhooks": json.dumps([call.body for call in world.backend.calls()]).encode(),
        "records": b"".join(site.record(key) for key in world.keys("jobs/")),
        "dead letters": json.dumps(site.connection.reasons).encode(),
        "check": checked,
    }
    assert worker.terminate() == 0
    gathered["log"] = worker.log.read_bytes()

    # Then none of it holds a secret, and none of it is empty
    assert {name for name, content in gathered.items() if not content} == set()
    found = {
        (place, name)
        for place, content in gathered.items()
        for name, secret in site.secrets.items()
        if secret.removeprefix("whsec_").encode() in content
    }
    assert found == set()


def check(world: World, env: Mapping[str, str]) -> bytes:
    """Run `darkroom check` on settings with which nothing can be right; return its output."""
    done = subprocess.run(
        [str(Path(sys.executable).parent / "darkroom"), "check"],
        env=world.env() | {"MODEL_ID": str(world.folder), "LOG_LEVEL": "DEBUG"} | dict(env),
        cwd=world.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    return done.stdout
