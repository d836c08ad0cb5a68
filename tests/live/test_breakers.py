"""Credentials that a part refuses: the worker stops taking jobs, fails none for it, and goes on by itself."""

import socket
import socketserver
import threading
import time
import uuid
from collections.abc import Iterator

import pytest

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.station import start_light_worker
from tests.support.world import Worker, World, eventually, new_world

# Within which the worker acts on what its readiness tells at once.
TICK_SECONDS = 1.0
# Otherwise it is looked again, and told again, after 5 and 20 seconds.
QUICK = {"worker.breakers:PAUSES_SECONDS": (0.5, 1.0), "worker.results.notifier:DELAYS_SECONDS": (0.5, 1.0)}
NO_PATH = b"?"  # none has a question mark
EXPIRED, NO_BUCKET = (403, "ExpiredToken"), (404, "NoSuchBucket")


class DenyingStore(socketserver.ThreadingTCPServer):
    """In front of the store: passes every byte, or answers each request with `denial`, a status and a code."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, store: SeaweedFS) -> None:
        super().__init__(("127.0.0.1", 0), _ConnectionHandler)
        self.target = ("127.0.0.1", store.port)
        self.is_denying = False
        self.denial = EXPIRED
        self.denied_path = NO_PATH
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _ConnectionHandler(socketserver.BaseRequestHandler):
    server: DenyingStore

    def handle(self) -> None:
        """Serve one connection; while it is denied, a connection is one request."""
        with socket.create_connection(self.server.target) as store:
            threading.Thread(target=self._pass_back, args=(store,), daemon=True).start()
            while content := self.request.recv(1 << 16):
                if self.server.is_denying or self._is_read_of(content, self.server.denied_path):
                    self._deny()
                    return
                store.sendall(content)

    def _is_read_of(self, content: bytes, path: bytes) -> bool:
        line, _, _ = content.partition(b"\r\n")
        return line.startswith((b"GET ", b"HEAD ")) and path in line.split(b"?")[0]

    def _pass_back(self, store: socket.socket) -> None:
        try:
            while content := store.recv(1 << 16):
                self.request.sendall(content)
        except OSError:
            return  # the connection was denied meanwhile

    def _deny(self) -> None:
        status, code = self.server.denial
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        head = f"HTTP/1.1 {status} No\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
        self.request.sendall(head.encode() + b"Connection: close\r\n\r\n" + body)


@pytest.fixture(scope="module")
def passage(s3_server: SeaweedFS) -> Iterator[DenyingStore]:
    made = DenyingStore(s3_server)
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def lasting_world(
    rabbitmq: RabbitMQ, s3_server: SeaweedFS, passage: DenyingStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    with new_world(rabbitmq, s3_server, tmp_path_factory.mktemp("world")) as made:
        start_light_worker(made, constants=QUICK, AWS_S3_ENDPOINT_URL=passage.url)
        yield made


@pytest.fixture
def world(lasting_world: World, passage: DenyingStore) -> Iterator[World]:
    """Start one world for all tests, with one worker without torch; each test leaves them as good as new."""
    token = lasting_world.backend.token
    yield lasting_world
    lasting_world.backend.token = token
    passage.is_denying, passage.denied_path, passage.denial = False, NO_PATH, EXPIRED
    worker = lasting_world.workers[0]
    eventually(lambda: worker.get("/health/ready")[0] == 200, worker.log_tail)
    lasting_world.wait_until_clean()


@pytest.fixture
def worker(world: World) -> Worker:
    return world.workers[0]


def is_refused(worker: Worker) -> bool:
    status, body = worker.get("/health/ready")
    return status == 503 and "refuses this worker" in body


def num_steps(worker: Worker) -> float:
    return worker.metric("darkroom_denoise_lane_steps_total")


def test_backend_that_refuses_the_token_stops_consuming_until_it_accepts_it(world: World, worker: Worker) -> None:
    right = world.backend.token
    world.backend.token = "rotated"
    drawn = [world.publish() for _ in range(3)]
    eventually(lambda: is_refused(worker), worker.log_tail)
    time.sleep(TICK_SECONDS)
    steps = num_steps(worker)
    waiting = [world.publish() for _ in range(3)]

    # They stay in the queue, where another worker may take them, and the GPU does nothing for them.
    eventually(lambda: world.queues()[""] == (3, 0), lambda: str(world.queues()))
    assert num_steps(worker) == steps
    assert worker.metric("darkroom_idle_seconds_total", reason="refused") > 0

    world.backend.token = right
    for generation_id in drawn + waiting:
        assert world.wait_for_end(generation_id).kind == "complete"
    eventually(lambda: worker.get("/health/ready")[0] == 200)
    world.wait_until_clean()
    assert all(len(world.backend.ends(generation_id)) == 1 for generation_id in drawn + waiting)


@pytest.mark.parametrize("denial", [EXPIRED, NO_BUCKET], ids=["the keys", "the bucket"])
def test_store_that_refuses_the_keys_fails_no_job_and_draws_no_image_twice(
    world: World, worker: Worker, passage: DenyingStore, denial: tuple[int, str]
) -> None:
    # Given a job that is being drawn when the keys expire, or the bucket goes
    passage.denial = denial
    steps, task_id = num_steps(worker), str(uuid.uuid4())
    running = world.publish(task_id=task_id, prompt="hold@30", num_inference_steps=60)
    world.wait_for_step(running)
    passage.is_denying = True
    (world.folder / f"go-{task_id}").touch()

    # When it comes to storing its picture, then the worker waits and takes no more
    eventually(lambda: is_refused(worker), worker.log_tail)
    assert denial[1] in worker.get("/health/ready")[1]
    time.sleep(TICK_SECONDS)
    waiting = world.publish()
    eventually(lambda: world.queues()[""] == (1, 1), lambda: str(world.queues()))

    # And goes on once they are right, with the picture it has
    passage.is_denying = False
    for generation_id in (running, waiting):
        assert world.wait_for_end(generation_id).kind == "complete"
        assert world.backend.calls("failed", generation_id) == []
    world.wait_until_clean()
    # A turn is counted behind its answers.
    eventually(lambda: num_steps(worker) == steps + 60 + 8, lambda: str(num_steps(worker)))


def test_object_that_may_not_be_read_fails_its_own_job(world: World, worker: Worker, passage: DenyingStore) -> None:
    passage.denied_path = b"/private/"
    for field in ("lora_path", "signature_path"):
        end = world.wait_for_end(world.publish(**{field: "private/a.safetensors"}))

        assert (end.kind, end.body["error_code"]) == ("failed", "INPUT_FORBIDDEN")
        assert "private/a.safetensors" in end.body["error_message"]
    assert worker.get("/health/ready")[0] == 200
    assert world.wait_for_end(world.publish()).kind == "complete"
