"""`darkroom dead`, as a person types it, on a real broker and a real store."""

import json
import re
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pika
import pytest
import typer
from typer.testing import CliRunner, Result

from clients.storage.client import Storage
from clients.storage.location import ObjectRef
from clients.webhooks import WebhookKind
from config.broker import BrokerSettings
from config.store import StoreSettings
from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.station import start_light_worker
from tests.hostile.raw_properties import FROM_THE_FIELD, Raw, field, headers, long
from tests.support.world import World, eventually, new_world
from tests.worker.cli.test_commands import darkroom, typed
from worker.amqp.delivery import NO_ORIGIN, Delivery, Origin
from worker.amqp.publisher import Publisher
from worker.amqp.queue_browser import MAX_DELIVERIES, QueueBrowser
from worker.amqp.topology import QueueNames
from worker.cli.main import app
from worker.errors import ErrorCode
from worker.messages.identity import own_task_id
from worker.results.ledger import Ledger
from worker.results.outbox_snapshots import SnapshotStore, SnapshotWriter
from worker.results.pacing import ParkedEvent
from worker.results.terminal_event import TerminalEvent, failed_event
from worker.tracing.context import TraceContext

TASK_ID = "660f9511-f3ac-52e5-b827-557766551111"
BROKEN = b"\x89PNG\x00\x1b[31m\xff not JSON"
HOSTILE = "a fox\x1b]0;owned\x07 \x9b2J \u202egnp.exe"


class Operator:
    """An operator at a terminal beside a world's queues."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.names = QueueNames(world.queue)
        self.broker = BrokerSettings(**world.env())  # type: ignore[arg-type]
        self.store = StoreSettings(**world.env())  # type: ignore[arg-type]
        self.ledger = Ledger(Storage(self.store), self.store.bucket)

    def types(self, *arguments: object, answer: str | None = None, columns: int = 200, of: str = "dead") -> Result:
        """Run `darkroom dead …` in this process, or another group of commands."""
        return CliRunner().invoke(app, [of, *map(str, arguments)], input=answer, env={"COLUMNS": str(columns)})

    def listed(self) -> list[dict[str, Any]]:
        done = self.types("list", "--json")
        assert done.exit_code == 0, done.output
        return [json.loads(line) for line in done.stdout.splitlines()]

    def add_letters(
        self, *bodies: bytes, reason: str = "ENGINE_CRASHED: it died twice", origin: Origin = NO_ORIGIN
    ) -> None:
        """Publish dead letters as a worker does."""
        publisher = Publisher(self.broker, self.names)
        publisher.start()
        for body in bodies:
            publisher.publish(self.names.dead, body, reason=reason, origin=origin)
        publisher.close()

    def take(self, queue_name: str) -> list[tuple[Any, bytes]]:
        """Take the properties and the body of every message in the queue."""
        connection = pika.BlockingConnection(pika.URLParameters(self.world.rabbitmq.url))
        channel = connection.channel()
        taken = []
        while (got := channel.basic_get(queue_name, auto_ack=True))[0] is not None:
            taken.append((got[1], got[2]))
        connection.close()
        return taken

    def put(self, queue_name: str, properties: Any, body: bytes) -> None:
        connection = pika.BlockingConnection(pika.URLParameters(self.world.rabbitmq.url))
        channel = connection.channel()
        channel.confirm_delivery()
        channel.basic_publish("", queue_name, body, properties)
        connection.close()

    def declare(self, queue_name: str, **arguments: Any) -> None:
        connection = pika.BlockingConnection(pika.URLParameters(self.world.rabbitmq.url))
        connection.channel().queue_declare(queue_name, durable=True, arguments=arguments)
        connection.close()

    def wait_for(self, **depths: int) -> None:
        """Return once these of the queues have so many messages ready, and none unacknowledged; a missing one has 0."""
        wanted = {f".{name}".replace(".jobs", ""): (depth, 0) for name, depth in depths.items()}

        def is_so() -> bool:
            queues = dict.fromkeys(wanted, (0, 0)) | self.world.queues()
            return wanted.items() <= queues.items()

        eventually(is_so, lambda: str(self.world.queues()))


@pytest.fixture
def operator(
    rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Operator]:
    with new_world(rabbitmq, s3_server, tmp_path) as world:
        for name, value in world.env().items():
            monkeypatch.setenv(name, value)
        yield Operator(world)


def job(task_id: str = TASK_ID, generation_id: int = 456, **fields: Any) -> bytes:
    wanted = {"generation_id": generation_id, "prompt": "a red fox", "num_inference_steps": 4} | fields
    return json.dumps({"task_id": task_id, "type": "image_generation", "data": wanted}).encode()


def crashed(task_id: str = TASK_ID) -> TerminalEvent:
    return failed_event(
        task_id=task_id, generation_id=456, code=ErrorCode.ENGINE_CRASHED, message="it died twice", retry_count=0
    )


def complete(task_id: str = TASK_ID) -> TerminalEvent:
    body = {"generation_id": 456, "result_url": "https://x/y.png", "metadata": {}}
    return TerminalEvent(task_id, 456, WebhookKind.COMPLETE, body)


def is_harmless(text: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in text)


def test_every_kind_of_letter_is_listed_and_stays(operator: Operator) -> None:
    operator.add_letters(job())
    operator.add_letters(crashed(str(uuid.UUID(int=7))).to_json(), reason="the backend refused the failed webhook: 400")
    operator.add_letters(BROKEN, reason="not a job: the body is not UTF-8 \x1b[31m")

    table = operator.types("list")
    letters = {letter["kind"]: letter for letter in operator.listed()}

    assert table.exit_code == 0
    assert all(
        word in table.stdout for word in (TASK_ID, "456", "ENGINE_CRASHED", "webhook", "not a job", "\\u001b[31m")
    )
    assert is_harmless(table.stdout)
    assert (letters["job"]["task_id"], letters["job"]["generation_id"]) == (TASK_ID, 456)
    assert letters["event"]["task_id"] == str(uuid.UUID(int=7))
    assert (letters["not a job"]["task_id"], letters["not a job"]["body_bytes"]) == (None, len(BROKEN))
    assert abs(datetime.fromisoformat(letters["job"]["died_at"]).timestamp() - time.time()) < 60
    assert len(operator.types("list", "--json", "--reason", "BACKEND").stdout.splitlines()) == 1
    operator.wait_for(dead=3)


def test_a_number_stays_with_its_letter_of_a_hundred(operator: Operator) -> None:
    operator.add_letters(*(job(str(uuid.UUID(int=number)), number) for number in range(1, 101)))

    first, second = operator.listed(), operator.listed()
    shown = operator.types("show", 50)
    purged = operator.types("purge", 50, "--yes")
    third = operator.listed()

    assert len(first) == 100
    assert first == second
    assert first[49]["task_id"] in shown.stdout
    assert (purged.exit_code, "1 letter purged" in purged.output) == (0, True)
    assert [letter["task_id"] for letter in third] == [letter["task_id"] for letter in first if letter["number"] != 50]


def test_listing_often_uses_up_no_letter(operator: Operator) -> None:
    """RabbitMQ 4 has this limit on every quorum queue; older ones take it as an argument."""
    operator.declare(operator.names.dead, **{"x-queue-type": "quorum", "x-delivery-limit": 20})
    operator.add_letters(job(), BROKEN)
    died_at = {letter["died_at"] for letter in operator.listed()}

    for _ in range(50):
        with QueueBrowser(operator.broker, operator.names.dead) as inspection:
            taken = inspection.fetch(10)

        assert sorted(held.body for held in taken) == sorted((job(), BROKEN))

    assert {letter["died_at"] for letter in operator.listed()} == died_at
    assert {letter["reason"] for letter in operator.listed()} == {"ENGINE_CRASHED: it died twice"}


def test_letters_whose_headers_pika_cannot_decode_are_listed_shown_copied_and_replayed(operator: Operator) -> None:
    operator.declare(operator.names.dead, **{"x-queue-type": "quorum"})
    for number, encoded in enumerate(FROM_THE_FIELD.values()):
        operator.put(operator.names.dead, Raw(encoded), job(str(uuid.UUID(int=number)), number + 1))
    listed = operator.listed()

    # Each look takes them all, and after the first they go back as copies.
    numbers = [[*FROM_THE_FIELD].index(name) for name in ("milliseconds", "tables nested deep", "our own names")]
    shown = [operator.types("show", uuid.UUID(int=number)) for number in numbers]
    again = operator.listed()
    replayed = operator.types("replay", "--all")

    assert len(shown) > MAX_DELIVERIES
    assert listed == again
    assert [done.exit_code for done in shown] == [0] * len(shown)
    assert is_harmless("".join(done.stdout for done in shown))
    assert any("header sent_at: 1772000000000\n" in done.stdout for done in shown)
    assert f"{len(FROM_THE_FIELD)} of {len(FROM_THE_FIELD)} letters replayed" in replayed.stdout
    operator.wait_for(dead=0, jobs=len(FROM_THE_FIELD))


def test_a_letter_copied_goes_to_no_queue_that_its_headers_name(operator: Operator) -> None:
    """The broker sends a message to the queues in its header `CC` as well, a copy like any other."""
    operator.add_letters(BROKEN)
    operator.declare(elsewhere := f"{operator.world.queue}.elsewhere")
    copied_to = headers(field(b"CC", b"A", long(b"S" + long(elsewhere.encode()))))
    operator.put(operator.names.dead, Raw(copied_to), b"a copy")
    operator.wait_for(dead=2, elsewhere=1)

    for _ in range(2 * MAX_DELIVERIES):
        with QueueBrowser(operator.broker, operator.names.dead) as inspection:
            assert len(inspection.fetch(10)) == 2
    operator.wait_for(dead=2, elsewhere=1)


def test_letter_is_shown_whole_and_escaped_for_the_terminal(operator: Operator) -> None:
    operator.add_letters(job(prompt=HOSTILE, artist_name="서울 아틀리에"), reason="INTERNAL_ERROR: \x1b[2J")
    operator.add_letters(BROKEN, reason="not a job: the body is not UTF-8")
    broken = next(letter["number"] for letter in operator.listed() if letter["kind"] == "not a job")

    asked, binary = operator.types("show", TASK_ID.upper()), operator.types("show", broken)

    assert (asked.exit_code, binary.exit_code) == (0, 0)
    assert all(word in asked.stdout for word in ('"prompt": "a fox\\u001b]0;owned', "\\u202egnp.exe", "서울 아틀리에"))
    assert "INTERNAL_ERROR" in asked.stdout
    assert "\\x89PNG\\u0000\\u001b[31m\\xff not JSON" in binary.stdout
    assert is_harmless(asked.stdout + binary.stdout)


def test_list_without_dead_letters_reports_it_and_declares_no_queue(operator: Operator) -> None:
    for arguments in (["list"], ["replay", "--all"], ["purge", "--all"]):
        done = operator.types(*arguments)
        assert (done.exit_code, done.output) == (0, "nothing is dead\n")

    for arguments in (["show", "1"], ["replay", TASK_ID], ["purge", "1", "--yes"]):
        done = operator.types(*arguments)
        assert (done.exit_code, "nothing is dead" in done.output) == (1, True)

    assert operator.world.queues() == {}


def test_a_letter_that_does_not_exist_is_named(operator: Operator) -> None:
    operator.add_letters(job())

    for target in ("0", "2", "9" * 5000, "nobody", str(uuid.UUID(int=9)), "\x1b[31m"):
        done = operator.types("replay", target)

        # However wide the terminal is, and wherever it breaks the sentence.
        assert (done.exit_code, "there is 1 dead letter" in " ".join(done.output.split())) == (1, True), done.output
        assert is_harmless(done.output)
    operator.wait_for(dead=1, jobs=0)


@pytest.mark.parametrize("arguments", [[], ["1", "--all"], ["1", "--reason", "x"], ["--reason", "x"]])
@pytest.mark.parametrize("verb", ["replay", "purge"])
def test_ambiguous_arguments_are_refused(verb: str, arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["dead", verb, *arguments]).exit_code == 2


def test_a_broker_that_is_away_is_named_in_a_sentence(operator: Operator, tmp_path: Path) -> None:
    env = operator.world.env() | {"RABBITMQ_PORT": "1"}

    for run, arguments in ((darkroom, ["list"]), (typed, ["replay", "--all"])):
        done = run("dead", *arguments, env=env, folder=tmp_path)

        assert (done.returncode, "RABBITMQ_HOST" in done.stdout) == (1, True)
        assert "Traceback" not in done.stdout


def test_queue_browsed_by_another_is_not_reported_as_empty(operator: Operator) -> None:
    operator.add_letters(job())

    with QueueBrowser(operator.broker, operator.names.dead) as inspection:
        inspection.fetch(10)
        done = operator.types("list")

    assert (done.exit_code, "somebody else" in done.output) == (1, True)
    assert len(operator.listed()) == 1


def test_a_job_goes_back_as_a_new_task_of_the_same_generation(operator: Operator) -> None:
    operator.ledger.record(crashed())
    operator.add_letters(job(prompt_tags=["sunset"]))

    done = operator.types("replay", 1)

    [(properties, body)] = operator.take(operator.names.jobs)
    message = json.loads(body)
    assert done.exit_code == 0, done.output
    assert message["task_id"] in done.output
    assert message["task_id"] != TASK_ID == message["replay_of"]
    assert message["data"] == json.loads(job(prompt_tags=["sunset"]))["data"]
    assert (properties.headers or {}, properties.delivery_mode) == ({}, 2)  # a first attempt, without a reason
    operator.wait_for(dead=0)


def test_a_job_goes_back_to_the_queue_that_it_came_from_with_its_priority_and_trace(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    express, trace = f"{operator.names.jobs}.express", TraceContext(f"00-{'a' * 32}-{'b' * 16}-01", "congo=t61")
    monkeypatch.setenv("RABBITMQ_QUEUES", f"{express}:3,{operator.names.jobs}:1")
    operator.add_letters(job(), origin=Origin(express, 7, trace))

    done = operator.types("replay", 1)

    assert done.exit_code == 0, done.output
    [(properties, _)] = operator.take(express)
    assert (properties.priority, TraceContext.from_headers(properties.headers)) == (7, trace)


def test_a_replay_repeated_is_the_same_task_until_that_one_has_ended(operator: Operator) -> None:
    def replayed() -> str:
        operator.add_letters(job())
        assert operator.types("replay", TASK_ID).exit_code == 0
        return str(json.loads(operator.take(operator.names.jobs)[0][1])["task_id"])

    first, repeated = replayed(), replayed()
    operator.ledger.record(crashed(first))
    second = replayed()
    operator.ledger.record(complete(second))
    operator.add_letters(job())
    refused = operator.types("replay", TASK_ID)

    assert first == repeated != second
    assert (refused.exit_code, second in refused.output) == (1, True)
    operator.wait_for(dead=1, jobs=0)


def test_an_event_goes_back_to_the_outbox_for_another_day(operator: Operator) -> None:
    operator.ledger.record(crashed())
    operator.add_letters(crashed().to_json(), reason="the failed webhook was not taken: 503")

    done = operator.types("replay", "--all")

    [(properties, body)] = operator.take(operator.names.outbox)
    assert (done.exit_code, f"{TASK_ID}:failed" in done.output) == (0, True)
    assert body == crashed().to_json()  # and so the webhook's id
    assert abs(properties.headers["x-darkroom-since"] - time.time()) < 60
    operator.wait_for(dead=0)


def test_letter_that_a_replay_cannot_help_stays_with_the_reason(operator: Operator) -> None:
    done_task, delivered_task = (str(uuid.UUID(int=number)) for number in (1, 2))
    operator.ledger.record(complete(done_task))
    operator.ledger.mark_delivered(crashed(delivered_task))
    operator.add_letters(
        BROKEN, job(done_task), crashed(delivered_task).to_json(), job(str(uuid.UUID(int=3)), aspect_ratio="9:1")
    )
    operator.add_letters(job())

    done = operator.types("replay", "--all")
    [number] = [letter["number"] for letter in operator.listed() if letter["kind"] == "not a job"]
    alone = operator.types("replay", number)

    assert done.exit_code == 0
    assert all(
        word in done.output
        for word in ("holds no job", "complete", "taken a webhook", "UNSUPPORTED_ASPECT_RATIO", "1 of 5 letters")
    )
    assert (alone.exit_code, "holds no job" in alone.output) == (1, True)
    operator.wait_for(dead=4, jobs=1, outbox=0)


def test_job_whose_task_id_another_generation_had_is_replayed_whatever_its_end(
    operator: Operator,
) -> None:
    # Given a task id of a generation that is complete and told
    operator.ledger.mark_delivered(complete())
    other = replace(crashed(), generation_id=457, body=dict(crashed().body) | {"generation_id": 457})
    operator.add_letters(job(generation_id=457), replace(other, is_recorded=False).to_json())

    done = operator.types("replay", "--all")

    [(_, body)] = operator.take(operator.names.jobs)
    assert (done.exit_code, "2 of 2 letters replayed" in done.output) == (0, True), done.output
    assert json.loads(body)["replay_of"] == own_task_id(TASK_ID, 457)
    assert len(operator.take(operator.names.outbox)) == 1


def test_replay_of_all_is_narrowed_to_a_reason(operator: Operator) -> None:
    operator.add_letters(job(), reason="STORAGE_UNAVAILABLE: the object store failed 5 times")
    operator.add_letters(job(str(uuid.UUID(int=1))), reason="ENGINE_CRASHED: it died twice")

    none = operator.types("replay", "--all", "--reason", "webhook")
    some = operator.types("replay", "--all", "--reason", "storage_unavailable")

    assert (none.exit_code, "none of 2 letters" in none.output) == (0, True)
    assert (some.exit_code, "1 of 1 letter replayed" in some.output) == (0, True)
    assert [letter["reason"] for letter in operator.listed()] == ["ENGINE_CRASHED: it died twice"]


def test_letter_without_a_confirmed_copy_stays(operator: Operator) -> None:
    operator.declare(operator.names.jobs, **{"x-max-length": 1, "x-overflow": "reject-publish"})
    operator.add_letters(job(), job(str(uuid.UUID(int=1))))

    done = operator.types("replay", "--all")

    assert (done.exit_code, done.output.count("is tried again")) == (1, 1)
    assert "Traceback" not in done.output
    operator.wait_for(dead=1, jobs=1)


def test_a_lost_ack_leaves_the_letter_and_its_replay_is_the_same_task(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator.add_letters(job())
    with monkeypatch.context() as patch:
        patch.setattr(QueueBrowser, "ack", lambda *_: (_ for _ in ()).throw(RuntimeError("killed here")))
        operator.types("replay", 1)
    operator.wait_for(dead=1, jobs=1)

    again = operator.types("replay", 1)

    first, second = (json.loads(body)["task_id"] for _, body in operator.take(operator.names.jobs))
    assert (again.exit_code, first) == (0, second)
    operator.wait_for(dead=0)


def test_a_store_that_is_away_replays_nothing(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    operator.add_letters(job())
    monkeypatch.setenv("AWS_STORAGE_BUCKET_NAME", "nobody")

    done = operator.types("replay", "--all")

    assert (done.exit_code, "Not done" in done.output) == (1, True)
    operator.wait_for(dead=1, jobs=0)


def test_purging_confirms_first(operator: Operator) -> None:
    operator.add_letters(job(), BROKEN)

    declined = operator.types("purge", "--all", answer="n\n")
    unanswered = operator.types("purge", "--all", answer="")
    before = len(operator.listed())
    agreed = operator.types("purge", "--all", answer="y\n")

    assert (declined.exit_code, unanswered.exit_code, before) == (1, 1, 2)
    assert TASK_ID in declined.output
    assert (agreed.exit_code, "2 letters purged" in agreed.output) == (0, True)
    operator.wait_for(dead=0)


def test_purging_takes_only_what_was_shown_and_is_still_there(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator.add_letters(BROKEN, job())

    def think_long(*_: object, **__: object) -> bool:
        """Take both letters while the command waits; one of them comes back twice, and a new one dies."""
        taken = {body: properties for properties, body in operator.take(operator.names.dead)}
        operator.put(operator.names.dead, taken[BROKEN], BROKEN)
        operator.put(operator.names.dead, taken[BROKEN], BROKEN)
        operator.add_letters(job(str(uuid.UUID(int=1))))
        return True

    monkeypatch.setattr(typer, "confirm", think_long)

    done = operator.types("purge", "--all")

    assert (done.exit_code, "1 letter had gone meanwhile" in done.output) == (0, True), done.output
    assert "1 letter purged" in done.output
    assert sorted(letter["kind"] for letter in operator.listed()) == ["job", "not a job"]


def test_replayed_job_completes_and_its_end_is_delivered_again(operator: Operator, tmp_path: Path) -> None:
    worker = start_light_worker(operator.world)
    operator.ledger.record(crashed())
    operator.add_letters(job(generation_id=456))

    done = typed("dead", "replay", TASK_ID, env=operator.world.env(), folder=tmp_path)

    assert done.returncode == 0, done.stdout
    end = operator.world.wait_for_end(456)
    assert (end.kind, end.headers["webhook-id"].endswith(":complete")) == ("complete", True)
    assert end.headers["webhook-id"].partition(":")[0] in done.stdout
    operator.world.wait_until_clean()
    eventually(lambda: [event["attempt"] for event in worker.events("job out")] == [1], worker.log_tail)


# --- The ends that wait


def parked(number: int, reason: str, age_seconds: float) -> ParkedEvent:
    event = crashed(str(uuid.UUID(int=number)))
    delivery = Delivery(
        body=event.to_json(),
        queue="outbox",
        is_redelivered=False,
        attempt=4,
        num_deliveries=0,
        since=time.time() - age_seconds,
        session=1,
        tag=number,
        channel_number=1,
        reason=reason,
    )
    return ParkedEvent(event, delivery, 4)


def test_ends_waiting_in_the_queue_and_in_a_worker_are_listed(operator: Operator) -> None:
    # Given one in the queue, and two that a worker holds, which nobody sees in RabbitMQ
    assert operator.types("list", of="outbox").stdout == "no end waits for the backend\n"
    publisher = Publisher(operator.broker, operator.names)
    publisher.start()
    ready = crashed(str(uuid.UUID(int=3)))
    publisher.publish(operator.names.outbox, ready.to_json(), attempt=2, reason="HTTP 503", since=time.time() - 60)
    publisher.close()
    held = [parked(1, "HTTP 500", 7200), parked(2, "no answer within 20 s", 600)]
    notes = SnapshotStore(Storage(operator.store), operator.store.bucket)
    SnapshotWriter("gpu-1:7", notes, lambda: held, threading.Event()).report()

    # When they are listed, then with what came of the last try, and the oldest first
    lines = [json.loads(line) for line in operator.types("list", "--json", of="outbox").stdout.splitlines()]
    assert [one["reason"] for one in lines] == ["HTTP 500", "no answer within 20 s", "HTTP 503"]
    assert [one["worker"] for one in lines] == ["gpu-1:7", "gpu-1:7", ""]
    assert [one["num_tries"] for one in lines] == [3, 3, 1]

    # And at 80 columns every id is whole
    table = operator.types("list", of="outbox", columns=80).stdout
    assert all(str(uuid.UUID(int=number)) in table for number in (1, 2, 3))
    assert re.search(r"3 ends wait, failing since \d{4}-\d\d-\d\d \d\d:\d\d UTC: HTTP 500", table)
    assert max(map(len, table.splitlines())) <= 80

    # And whoever looks for dead letters hears of them
    assert "3 ends wait, failing since" in operator.types("list").stdout
    operator.wait_for(outbox=1)


def test_foreign_note_hides_no_other(operator: Operator) -> None:
    storage = Storage(operator.store)
    for number, content in enumerate([b"", b"[" * 5000, b"{}", b'{"waiting": [1]}', b'{"waiting": [{"since": "x"}]}']):
        ref = ObjectRef(operator.store.bucket, f".darkroom/outbox/strange-{number}.json")
        storage.put(ref, content, content_type="application/json")
    notes = SnapshotStore(storage, operator.store.bucket)
    SnapshotWriter("gpu-1:7", notes, lambda: [parked(1, "HTTP 500", 60)], threading.Event()).report()

    assert [one.task_id for one in notes.read_all()] == [str(uuid.UUID(int=1))]


def test_worker_without_waiting_ends_deletes_its_note(operator: Operator) -> None:
    notes = SnapshotStore(Storage(operator.store), operator.store.bucket)
    held = [parked(1, "HTTP 500", 60)]
    reporter = SnapshotWriter("gpu-1:7", notes, lambda: held, threading.Event())
    reporter.report()
    held.clear()
    reporter.report()

    assert notes.read_all() == []


def test_waiting_ends_are_warned_of_once_an_hour(operator: Operator, caplog: pytest.LogCaptureFixture) -> None:
    notes = SnapshotStore(Storage(operator.store), operator.store.bucket)
    now = 0.0
    reporter = SnapshotWriter("a:1", notes, lambda: [parked(1, "HTTP 500", 60)], threading.Event(), lambda: now)
    for now in (0.0, 30.0, 3570.0, 3600.0, 3630.0):  # noqa: B007 - the clock reads it
        reporter.report()

    warnings = [record for record in caplog.records if record.getMessage() == "ends wait for the backend"]
    assert len(warnings) == 2


def test_the_list_of_dead_letters_fits_eighty_columns(operator: Operator) -> None:
    operator.add_letters(
        job(), crashed(str(uuid.UUID(int=7))).to_json(), reason="the complete webhook was not taken: " * 3
    )

    table = operator.types("list", columns=80).stdout

    assert max(map(len, table.splitlines())) <= 80
    assert all(word in table for word in (TASK_ID, str(uuid.UUID(int=7)), "webhook", "456"))
