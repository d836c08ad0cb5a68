"""The examples for Django and Celery: charged once, published after the commit, refunded once."""

import json
import os
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pika
import pytest
import requests

from clients.webhooks import Webhook, WebhookClient, WebhookKind, WebhookResult
from config.backend import BackendSettings
from examples.parts.ports import free_port
from examples.parts.rabbitmq import RabbitMQ
from tests.support.contract_schemas import examples, validator_of
from tests.support.example_programs import EXAMPLES, SECRET, TOKEN
from tests.support.world import eventually

BODIES = {name: payload for name, _, payload in examples()}
BALANCE, PRICE = 100, 10


def next_job(rabbitmq: RabbitMQ, queue: str) -> dict[str, Any] | None:
    """Take the next job from the queue, which is declared as the worker does; None where there is none."""
    with closing(pika.BlockingConnection(pika.URLParameters(rabbitmq.url))) as connection:
        channel = connection.channel()
        channel.queue_declare(queue, durable=True)
        _, properties, body = channel.basic_get(queue, auto_ack=True)
    if body is None:
        return None
    job: dict[str, Any] = json.loads(body)
    validator_of("job").validate(job)
    assert (properties.delivery_mode, properties.content_type) == (2, "application/json")
    assert properties.message_id == job["task_id"]
    return job


# --- Django


class Shop:
    """The Django example, with a database of its own."""

    def __init__(self, folder: Path, rabbitmq: RabbitMQ, queue: str) -> None:
        self.database = folder / "gallery.sqlite3"
        self._log = folder / "server.log"
        self._env = os.environ | rabbitmq.env()
        self._env |= {"RABBITMQ_QUEUE": queue, "DATABASE": str(self.database), "PYTHONWARNINGS": "ignore"}
        self._env |= {"INTERNAL_API_TOKEN": TOKEN, "WEBHOOK_SIGNING_SECRET": SECRET}
        self.manage("migrate", "--run-syncdb")

    def manage(self, *arguments: str, **env: str) -> str:
        """Run a command of manage.py; what it prints."""
        command = [sys.executable, "manage.py", *arguments]
        ended = subprocess.run(
            command, cwd=EXAMPLES / "django", env=self._env | env, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.strip()

    def select(self, statement: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.database)) as connection:
            return connection.execute(statement).fetchall()

    @contextmanager
    def served(self) -> Iterator[str]:
        """Run its server; yield the address."""
        url = f"http://127.0.0.1:{free_port()}"
        command = [sys.executable, "manage.py", "runserver", "--noreload", url.removeprefix("http://")]
        with self._log.open("wb") as sink:
            process = subprocess.Popen(command, cwd=EXAMPLES / "django", env=self._env, stdout=sink, stderr=sink)
        try:
            eventually(lambda: answers(url), self._log.read_text)
            yield url
        finally:
            process.kill()
            process.wait()


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=120).status_code > 0
    except requests.ConnectionError:
        return False


@pytest.fixture
def shop(tmp_path: Path, rabbitmq: RabbitMQ, queue_name: str) -> Shop:
    """Make the example's database."""
    return Shop(tmp_path, rabbitmq, queue_name)


def test_django_publishes_what_it_charged_for_once_the_broker_is_back(
    shop: Shop, rabbitmq: RabbitMQ, queue_name: str
) -> None:
    generation_id = shop.manage("request_image", "1", "서울의 밤", RABBITMQ_PORT=str(free_port()))
    assert next_job(rabbitmq, queue_name) is None
    assert shop.select("SELECT balance FROM gallery_account") == [(BALANCE - PRICE,)]

    assert shop.manage("publish_outbox") == "1 published"
    assert shop.manage("publish_outbox") == "0 published"

    job = next_job(rabbitmq, queue_name)
    assert job is not None
    assert job["data"] == {"generation_id": generation_id, "prompt": "서울의 밤"}
    assert next_job(rabbitmq, queue_name) is None


def test_django_refunds_once_for_three_deliveries(shop: Shop, rabbitmq: RabbitMQ, queue_name: str) -> None:
    generation_id = shop.manage("request_image", "1", "a red fox")
    job = next_job(rabbitmq, queue_name)
    assert job is not None
    webhook = Webhook(
        WebhookKind.FAILED, f"{job['task_id']}:failed", BODIES["failed"] | {"generation_id": generation_id}
    )
    unknown = Webhook(WebhookKind.COMPLETE, "x:complete", BODIES["complete"] | {"generation_id": str(uuid.uuid4())})

    with shop.served() as url:
        settings = {"BACKEND_API_URL": url, "INTERNAL_API_TOKEN": TOKEN, "WEBHOOK_SIGNING_SECRET": SECRET}
        client = WebhookClient(BackendSettings(**settings))  # type: ignore[arg-type]
        forger = WebhookClient(BackendSettings(**settings | {"WEBHOOK_SIGNING_SECRET": None}))  # type: ignore[arg-type]
        assert forger.send(webhook).status == 401
        assert client.send(unknown).status == 404
        attempts = [client.send(webhook) for _ in range(3)]

    assert [attempt.result for attempt in attempts] == [WebhookResult.DELIVERED] * 3
    assert shop.select("SELECT balance FROM gallery_account") == [(BALANCE,)]
    assert shop.select("SELECT state, detail FROM gallery_generation") == [("failed", "CANCELLED")]


# --- Celery


@pytest.fixture
def celery(tmp_path: Path, rabbitmq: RabbitMQ, queue_name: str) -> Iterator[tuple[dict[str, str], Path]]:
    """Run a Celery worker; its environment and its log."""
    env = os.environ | rabbitmq.env() | {"RABBITMQ_QUEUE": queue_name, "DATABASE": str(tmp_path / "celery.sqlite3")}
    log = tmp_path / "celery.log"
    command = [sys.executable, "-m", "celery", "--app", "tasks", "worker", "--pool", "solo"]
    command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    with log.open("wb") as sink:
        process = subprocess.Popen(command, cwd=EXAMPLES / "celery", env=env, stdout=sink, stderr=sink)
    yield env, log
    process.terminate()
    process.wait()


def test_celery_publishes_a_plain_job_and_ends_it_once(
    celery: tuple[dict[str, str], Path], rabbitmq: RabbitMQ, queue_name: str
) -> None:
    env, log = celery

    def run(*command: str) -> str:
        ended = subprocess.run(
            [sys.executable, *command], cwd=EXAMPLES / "celery", env=env, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.strip()

    task_id = run("tasks.py", "456", "서울의 밤", '{"seed": 7}')
    jobs: list[dict[str, Any]] = []
    eventually(lambda: bool(jobs.extend(filter(None, [next_job(rabbitmq, queue_name)])) or jobs), log.read_text)
    ends = [[f"{number}:failed", BODIES["failed"] | {"generation_id": number}] for number in (456, 456, 457)]
    run("-c", f"from tasks import take_end; [take_end.delay(*end) for end in {ends!r}]")

    assert jobs == [
        {
            "task_id": task_id,
            "type": "image_generation",
            "data": {"generation_id": 456, "prompt": "서울의 밤", "seed": 7},
            "created_at": jobs[0]["created_at"],
        }
    ]
    eventually(lambda: "ended 457 CANCELLED" in log.read_text(), log.read_text)
    assert log.read_text().count("ended 456 CANCELLED") == 1
