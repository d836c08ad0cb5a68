"""What workers of version 0.1 left in the bucket and the queues, read by today's worker.

The files in tests/files/version-0.1 were written by that version's own code: records, the outbox, the dead letters and
the queues' arguments by commit 5eb2cd8, the lease by 5b3b2e0, the stage by ef484df. Bytes are text in latin-1.
"""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pika
import pytest
from typer.testing import CliRunner

from clients.storage.client import Storage
from clients.storage.location import ObjectRef
from config.settings import SECTIONS
from config.store import StoreSettings
from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.station import start_light_worker
from tests.support.paths import ROOT
from tests.support.world import World, eventually, new_world
from worker.breakers import STORE_THRESHOLD, Breaker, StoreGate
from worker.cli.main import app
from worker.jobs.leases import Lease
from worker.messages.decoder import decode
from worker.messages.rules import JobRules
from worker.product.stage_store import ProductStage, StageStore
from worker.results.image_store import ImageStore
from worker.results.ledger import Ledger

FILES = ROOT / "tests" / "files" / "version-0.1"
MESSAGES: list[dict[str, Any]] = json.loads((FILES / "messages.json").read_text())
OBJECTS: dict[str, dict[str, Any]] = json.loads((FILES / "objects.json").read_text())
QUEUES: dict[str, dict[str, Any]] = json.loads((FILES / "queues.json").read_text())
# Where a copy is when its time in the waiting queue is over.
ARRIVES_IN = {".retry.30": "", ".lease": ".recover"}
TASK_ID = "660f9511-f3ac-52e5-b827-55776655110{}"


def content_of(name: str) -> bytes:
    return str(OBJECTS[name]["body"]).encode("latin-1")


@pytest.fixture
def world(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path: Path) -> Iterator[World]:
    """Make a world as version 0.1 left it: its objects, its queues, its messages."""
    with new_world(rabbitmq, s3_server, tmp_path) as made:
        client = s3_server.client()
        for name, found in OBJECTS.items():
            kind, metadata = found["content_type"], found["metadata"]
            client.put_object(Bucket=made.bucket, Key=name, Body=content_of(name), ContentType=kind, Metadata=metadata)
        with pika.BlockingConnection(pika.URLParameters(rabbitmq.url)) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            for suffix, arguments in QUEUES.items():
                here = json.loads(json.dumps(arguments).replace("image_generation", made.queue))
                channel.queue_declare(made.queue + suffix, durable=True, arguments=here)
            for one in MESSAGES:
                publish(channel, made.queue + ARRIVES_IN.get(one["queue"], one["queue"]), one)
            for number in (1, 2):  # two whose records are there
                job = next(one for one in MESSAGES if one["queue"] == ".recover")
                body = job["body"].replace(TASK_ID.format(4), TASK_ID.format(number))
                body = body.replace('"generation_id": 4', f'"generation_id": {number}')
                publish(channel, made.queue, job | {"body": body, "headers": {}})
        yield made


def publish(channel: Any, queue: str, one: dict[str, Any]) -> None:
    headers = dict(one["headers"])
    if "x-darkroom-since" in headers:
        headers["x-darkroom-since"] = int(time.time())  # a day later it would be a dead letter
    properties = pika.BasicProperties(
        delivery_mode=2, content_type=one["content_type"], timestamp=one["timestamp"], headers=headers
    )
    channel.basic_publish("", queue, one["body"].encode("latin-1"), properties)


def test_worker_ends_what_version_0_1_left(world: World) -> None:
    worker = start_light_worker(world)

    ends = {number: world.wait_for_end(number) for number in (1, 3, 4, 5, 6)}
    world.wait_until_clean(dead=3)

    # Recorded ends are told as they were recorded, and one that was told already is not told again.
    for number in (1, 3):
        record = json.loads(content_of(f"jobs/{TASK_ID.format(number)}.json"))
        assert ends[number].body == record["body"]
        assert ends[number].headers["webhook-id"] == f"{TASK_ID.format(number)}:complete"
    assert world.backend.ends(2) == []
    # The others are drawn: redelivered, tried again, on a lease whose worker is gone.
    assert {ends[number].kind for number in (4, 5, 6)} == {"complete"}
    attempts = {line["generation_id"]: line["attempt"] for line in worker.events("job out")}
    assert (attempts[4], attempts[5], attempts[6]) == (1, 2, 1)
    ledger = Ledger(Storage(SECTIONS["store"](**world.env())), world.bucket)  # type: ignore[arg-type]
    eventually(lambda: all(ledger.find(TASK_ID.format(n)).is_delivered for n in (1, 2, 3)), worker.log_tail)  # type: ignore[union-attr]


def test_operators_commands_read_what_version_0_1_left(world: World) -> None:
    def rows_of(*words: str) -> list[dict[str, Any]]:
        done = CliRunner().invoke(app, [*words, "--json"], env=world.env())
        assert done.exit_code == 0, done.output
        return [json.loads(line) for line in done.stdout.splitlines()]

    letters = {row["kind"]: row for row in rows_of("dead", "list")}
    waiting = rows_of("outbox", "list")
    jobs = {row["task_id"]: row for row in rows_of("report")}

    assert set(letters) == {"job", "event", "not a job"}
    assert letters["job"]["reason"] == "ENGINE_CRASHED: it crashed the engine twice"
    assert [(row["task_id"], row["num_tries"]) for row in waiting] == [(TASK_ID.format(3), 3)]
    assert set(jobs) == {TASK_ID.format(number) for number in (1, 2, 3)}


def test_stage_of_version_0_1_is_resumed_from(store_settings: StoreSettings) -> None:
    name, bucket = "stages/gen-7/cutout.png", store_settings.bucket
    storage = Storage(store_settings)
    storage.put(ObjectRef(bucket, name), content_of(name), content_type="image/png", metadata=OBJECTS[name]["metadata"])
    body = json.dumps({"task_id": TASK_ID.format(7), "data": {"generation_id": 7, "prompt": "a fox"}}).encode()
    job = decode(body, JobRules(8, 3.0, locate=lambda _: pytest.fail("names nothing")))
    images = ImageStore(storage, StoreGate(Breaker("the store", STORE_THRESHOLD), threading.Event()))

    stage = StageStore(images, bucket, job).find(ProductStage.CUTOUT, "RGBA")

    assert stage is not None
    assert (stage.image.size, stage.is_changed) == ((4, 4), False)


def test_lease_note_of_version_0_1_is_read_as_one_that_has_run_out() -> None:
    lease = Lease.from_json(content_of(f"jobs/{TASK_ID.format(6)}.lease"))

    assert (lease.is_held, lease.num_crashes) == (False, 0)
