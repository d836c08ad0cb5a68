"""A world whose workers reach broker, store and backend through proxies, with an engine that waits on command."""

import hashlib
import json
import os
import random
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from examples.parts.backend import WEBHOOKS
from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.proxy import DOWN, UP, Link, Proxy, Sign
from tests.support.paths import ROOT
from tests.support.world import Worker, World, eventually, new_world

SITE = Path(__file__).parent / "site"

# The broker gives a silent peer up after three of these, the worker a silent broker after 2 × (2 + 5) seconds.
HEARTBEAT_SECONDS = 2
# Where a test has to wait for it, the retry queue has this pause; a queue's name tells it.
RETRY_SECONDS = 1
QUICK_RETRIES = {"worker.amqp.topology:RETRY_DELAYS_SECONDS": [RETRY_SECONDS] * 4}


class Job(NamedTuple):
    """A published job."""

    task_id: str
    generation_id: int


@dataclass
class Station:
    """A world and the proxies around it."""

    world: World
    broker: Proxy
    store: Proxy
    backend: Proxy
    _published: list[Job] = field(default_factory=list)

    @property
    def journal(self) -> Path:
        return self.world.folder / "journal"

    def env(self, *, constants: Mapping[str, Any] | None = None) -> dict[str, str]:
        """Return the variables of a worker of this station; `constants` by module and name, see
        `site/sitecustomize.py`.
        """
        return {
            **stand_in_env(self.journal, constants or {}),
            "FAULTS_FOLDER": str(self.world.folder),
            "FAULTS_CLOCK": str(self.world.folder / "clock"),
            "RABBITMQ_PORT": str(self.broker.port),
            "RABBITMQ_HEARTBEAT_SECONDS": str(HEARTBEAT_SECONDS),
            "AWS_S3_ENDPOINT_URL": f"http://{Proxy.host}:{self.store.port}",
            "BACKEND_API_URL": f"http://{Proxy.host}:{self.backend.port}",
        }

    def start_worker(self, *, constants: Mapping[str, Any] | None = None, **env: str) -> Worker:
        """Start a worker and return once it is ready."""
        worker = self.world.start_worker(**self.env(constants=constants) | env)
        worker.wait_until_ready()
        return worker

    def publish(self, prompt: str = "a red fox", **fields: Any) -> Job:
        task_id = str(uuid.uuid4())
        job = Job(task_id, self.world.publish(task_id=task_id, prompt=prompt, **fields))
        self._published.append(job)
        return job

    def publish_held(self, **fields: Any) -> Job:
        """Publish a job that the engine begins and holds in its third step; so does everything beside it."""
        job = self.publish("hold@3", **fields)
        self.wait_until_held(job)
        return job

    def wait_until_held(self, job: Job, times: int = 1) -> None:
        eventually(lambda: self.num_held(job) == times, self.world.workers[-1].log_tail)

    def release(self, job: Job) -> None:
        (self.world.folder / f"go-{job.task_id}").touch()

    def make_sound(self) -> None:
        """Take back whatever a test may have left behind: faults, held jobs, a wrong clock."""
        for proxy in (self.broker, self.store, self.backend):
            proxy.pass_on()
        for kind in WEBHOOKS.values():
            self.world.backend.answer(kind, 200)
        for job in self._published:
            self.release(job)
        self._published.clear()
        for name in ("reached", "go", "clock"):
            (self.world.folder / name).unlink(missing_ok=True)
        if sum(self.world.queues().get(".dead", ())):
            self.world.dead_letters()

    def set_clock(self, seconds: float) -> None:
        """Have the workers' wall clock be wrong by that much, from one moment to the next."""
        new = self.world.folder / "clock.new"
        new.write_text(str(seconds))
        new.replace(self.world.folder / "clock")

    def num_handed(self, job: Job) -> int:
        """Count how often an engine was given the job."""
        return self._noted("generate", job)

    def num_runs(self, job: Job) -> int:
        """Count how often the job was begun, by all engines together."""
        return self._noted("begin", job)

    def num_held(self, job: Job) -> int:
        """Count how often an engine came to the step where it holds."""
        return self._noted("held", job)

    def num_finished(self, job: Job) -> int:
        """Count how often it was drawn to its end."""
        return self._noted("end", job)

    def is_marked(self, job: Job) -> bool:
        """Return whether the job's record has the mark of a delivered end."""
        key = f"jobs/{job.task_id}.json"
        if key not in self.world.keys(key):
            return False
        record = self.world.store.client().get_object(Bucket=self.world.bucket, Key=key)["Body"].read()
        return json.loads(record)["is_delivered"] is True

    def object_of(self, job: Job) -> str:
        return f"generations/gen-{job.generation_id}.png"

    def posts(self, job: Job, kind: str = "complete") -> int:
        """Count the posts of the job's end, whatever the backend answered."""
        return len(self.world.backend.calls(kind, job.generation_id))

    def assert_complete_once(self, job: Job, *, num_runs: int | None = 1, num_posts: int | None = 1) -> None:
        """Assert one end, of one webhook id; one whole image; nothing left in any queue. None: any number."""
        world = self.world
        assert world.wait_for_end(job.generation_id).kind == "complete"
        # Behind the mark nobody tells the end again.
        eventually(lambda: self.is_marked(job), world.workers[-1].log_tail)
        world.wait_until_clean()
        assert len(world.backend.ends(job.generation_id)) == 1
        assert world.backend.calls("failed", job.generation_id) == []
        assert num_posts in (None, self.posts(job))
        assert num_runs in (None, self.num_runs(job))
        self.assert_image_is_whole(job)

    def assert_image_is_whole(self, job: Job) -> None:
        found = self.world.store.client().get_object(Bucket=self.world.bucket, Key=self.object_of(job))
        content = found["Body"].read()
        assert found["Metadata"] == {"task-id": job.task_id, "sha256": hashlib.sha256(content).hexdigest()}
        with Image.open(BytesIO(content)) as image:
            image.load()

    def assert_failed_once(self, job: Job, code: str) -> None:
        end = self.world.wait_for_end(job.generation_id)
        assert (end.kind, end.body["error_code"]) == ("failed", code)
        assert len(self.world.backend.ends(job.generation_id)) == 1
        assert self.posts(job) == 0

    def sign(self, verb: str, key: str) -> Sign:
        """Return the sign of the start of a request to the store."""
        return Sign(UP, f"{verb} /{self.world.bucket}/{key} ".encode())

    def put_of_image(self, job: Job) -> Sign:
        return self.sign("PUT", self.object_of(job))

    def put_of_record(self, job: Job) -> Sign:
        return self.sign("PUT", f"jobs/{job.task_id}.json")

    def _noted(self, event: str, job: Job) -> int:
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return sum(line.endswith(f" {event} {job.task_id}") for line in lines)


def stand_in_env(journal: Path, constants: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables of a worker with an engine without torch, which writes its events to `journal`."""
    return {
        "PYTHONPATH": f"{SITE}{os.pathsep}{ROOT}",
        "FAULTS_STAND_IN": "1",
        "FAULTS_CONSTANTS": json.dumps(dict(constants)),
        "MODEL_ID": str(journal),
    }


def start_light_worker(world: World, *, constants: Mapping[str, Any] | None = None, **env: str) -> Worker:
    """Start a worker without proxies and with the engine without torch: ready in one second instead of seven."""
    worker = world.start_worker(**stand_in_env(world.folder / "journal", constants or {}) | env)
    worker.wait_until_ready()
    return worker


# What the store and the backend say when they have done what was asked.
DONE = Sign(DOWN, b"HTTP/1.1 200")
ANY_REQUEST = Sign(UP, b" HTTP/1.1\r\n")
POST_OF_COMPLETE = Sign(UP, b"POST /api/webhooks/inference/complete ")


def kills(worker: Worker) -> Callable[[Link], None]:
    """Return a trigger's action: SIGKILL to the worker, and a reset of its link."""

    def kill(link: Link) -> None:
        link.reset()
        worker.kill()

    return kill


def answers(status: int, body: bytes = b"", **headers: str) -> Callable[[Link], None]:
    """Return a trigger's action: this HTTP answer in the server's place. Underscores in names become dashes."""
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    content = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
    return lambda link: link.answer(content)


def sometimes(do: Callable[[Link], None], share: float, rng: random.Random) -> Callable[[Link], None]:
    """Return a trigger's action: this in a share of the cases, else nothing."""

    def act(link: Link) -> None:
        if rng.random() < share:
            do(link)

    return act


@contextmanager
def new_station(rabbitmq: RabbitMQ, store: SeaweedFS, folder: Path) -> Iterator[Station]:
    """Make a station of its own on the session's servers."""
    with (
        new_world(rabbitmq, store, folder) as world,
        Proxy(rabbitmq.port) as to_broker,
        Proxy(store.port) as to_store,
        Proxy(world.backend.port) as to_backend,
    ):
        try:
            yield Station(world, to_broker, to_store, to_backend)
        finally:
            world.stop()
