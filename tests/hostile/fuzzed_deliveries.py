"""Deliver fuzzed properties and headers through a real broker into a real consumer and dispatcher.

`python -m tests.hostile.fuzzed_deliveries` runs the long form on its own broker and prints one line of JSON. The
engine, the store and the backend are fakes. Every delivery follows from the seed and its number.
"""

import argparse
import json
import random
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pika
import pika.exceptions
from rich.console import Console

from clients.webhooks import WebhookKind
from config.broker import BrokerSettings
from examples.parts.rabbitmq import RabbitMQ
from inference.errors import RequestCancelled
from tests.hostile.fuzzing import RULES, SEED
from tests.hostile.raw_properties import Raw, damaged_properties, fuzzed_properties
from worker.amqp.consumer import Consumer
from worker.amqp.delivery import NO_ORIGIN, Origin
from worker.amqp.publisher import Publisher
from worker.amqp.queue_browser import QueueBrowser
from worker.amqp.subscriptions import Broadcast, Subscription
from worker.amqp.topology import QueueNames
from worker.breakers import Breaker, StoreGate
from worker.cli.dead.letters import read_letters
from worker.cli.dead.view import as_json, as_table, as_text
from worker.jobs.cancellations import Cancellations
from worker.jobs.dispatcher import Dispatcher
from worker.jobs.handler import JobHandler
from worker.jobs.history import History
from worker.jobs.recovery import SuspectIsolation
from worker.jobs.runner import JobRunner
from worker.jobs.runs import Run, Runs
from worker.jobs.settler import Settler
from worker.metrics import Metrics
from worker.results.ledger import Ledger
from worker.results.notifier import Notifier
from worker.results.terminal_event import TerminalEvent
from worker.tracing.tracing import Tracing

BATCH = 500
PREFETCH = 200
# A guard against a hang: a worker that stands still never ends the batch.
BATCH_SECONDS = 300.0
UNREADABLE_SHARE, CANCELLED_SHARE, DAMAGED_SHARE = 0.02, 0.04, 0.005
NUM_LETTERS = 200


@dataclass
class FakeHandlers:
    """Fake handler, ledger and notifier of a `Dispatcher`; keeps what they are given."""

    publisher: Publisher
    names: QueueNames
    cancellations: Cancellations
    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    dead: Counter[bytes] = field(default_factory=Counter)
    num_bugs: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def draw(self, run: Run) -> TerminalEvent:
        """Return the end of a job without drawing it."""
        if self.cancellations.covers(cast("Any", run.decoded)):
            raise RequestCancelled
        return TerminalEvent(run.task_id, run.generation_id, WebhookKind.COMPLETE, {"attempt": run.attempt})

    def record(self, event: TerminalEvent) -> TerminalEvent:
        return event

    def note(self, event: TerminalEvent) -> str:
        with self._lock:
            self.ends[event.task_id, str(event.body.get("error_code", event.kind.value))] += 1
        return "delivered"

    def dead_letter(self, body: bytes, reason: str, *, attempt: int | None = None, origin: Origin = NO_ORIGIN) -> None:
        self.publisher.publish(self.names.dead, body, attempt=attempt, reason=reason, origin=origin)
        with self._lock:
            self.dead[body] += 1

    def note_bug(self) -> None:
        self.num_bugs += 1

    # The name that the runner calls it by.
    notify = note


class _Handler:
    """A `JobHandler` whose jobs `FakeHandlers` ends."""

    def __init__(self, fakes: FakeHandlers) -> None:
        self.worker = "fuzzed"
        self.handle = fakes.draw


class Bench:
    """A consumer and a dispatcher on a queue of their own, and the connections that publish to them."""

    def __init__(self, rabbitmq: RabbitMQ) -> None:
        self.url = rabbitmq.url + "?heartbeat=0"
        self.settings = BrokerSettings(**rabbitmq.env())  # type: ignore[arg-type]
        self.names = QueueNames(f"fuzzed-{uuid.uuid4().hex[:12]}")
        self.num_received = 0
        self.num_lost = 0
        self.num_delivered = 0
        self.publisher = Publisher(self.settings, self.names)
        self._cancellations = Cancellations()
        self.fakes = FakeHandlers(self.publisher, self.names, self._cancellations)
        self.dispatcher = self._new_dispatcher()
        self.consumer = Consumer(
            self.settings,
            self.names,
            [Subscription(self.names.jobs, PREFETCH, self._on_delivery)],
            Broadcast(self.names.cancel_exchange, self._on_cancel),
            on_lost=self._on_lost,
        )
        self.connection, self.channel = self._open()
        self.num_refused = 0

    def __enter__(self) -> "Bench":
        self.publisher.start()
        self.settler.start(self.consumer)
        self.consumer.start()
        self.wait_until(lambda: self.consumer.is_connected, "connected")
        return self

    def __exit__(self, *_: object) -> None:
        self.consumer.close()
        self.dispatcher.close()
        self.publisher.close()
        for name in (*self.names.everything, f"{self.names.dead}.inspection"):
            self.channel.queue_delete(name)
        self.channel.exchange_delete(self.names.cancel_exchange)
        self.connection.close()

    def publish(self, properties: bytes, body: bytes, *, exchange: str = "", queue: str = "") -> None:
        """Publish what the broker is known to take."""
        key = "" if exchange else queue or self.names.jobs
        self.channel.basic_publish(exchange, key, body, Raw(properties))

    def try_publish(self, properties: bytes, body: bytes) -> bool:
        """Publish what the broker may refuse by ending the connection; whether it took it."""
        connection, channel = self._open()
        channel.confirm_delivery()
        try:
            channel.basic_publish("", self.names.jobs, body, Raw(properties))
        except (pika.exceptions.AMQPError, OSError):
            self.num_refused += 1
            return False
        finally:
            with suppress(pika.exceptions.AMQPError, OSError):
                connection.close()
        return True

    def wait_until(self, is_so: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + BATCH_SECONDS
        while not is_so():
            assert self.num_lost == 0, f"not {what}: a delivery has ended the connection"
            assert time.monotonic() < deadline, f"not {what}: the worker stands still"
            self.connection.process_data_events(time_limit=0.01)

    def ready(self) -> int:
        """Count the messages ready in the queue of the jobs."""
        return int(self.channel.queue_declare(self.names.jobs, passive=True).method.message_count)

    def letters_shown(self) -> int:
        """Count the dead letters, each of them listed and shown."""
        with QueueBrowser(self.settings, self.names.dead) as inspection:
            letters = read_letters(inspection.fetch(10_000), RULES)
            as_table(letters)
            for letter in letters:
                assert as_text(letter).isprintable() or "\n" in as_text(letter)
                assert json.loads(as_json(letter))["number"] == letter.number
        return len(letters)

    def _open(self) -> tuple[Any, Any]:
        connection = pika.BlockingConnection(pika.URLParameters(self.url))
        return connection, connection.channel()

    def _on_delivery(self, delivery: Any) -> None:
        self.num_delivered += 1
        self.dispatcher.on_delivery(delivery)

    def _on_cancel(self, body: bytes) -> None:
        self.dispatcher.on_cancel(body)
        self.num_received += 1

    def _on_lost(self) -> None:
        self.num_lost += 1

    def _new_dispatcher(self) -> Dispatcher:
        is_draining, isolation, runs, metrics = threading.Event(), SuspectIsolation(), Runs(), Metrics()
        notifier, nothing = cast("Notifier", self.fakes), cast("Any", None)
        self.settler = Settler(self.publisher, notifier, self.names, isolation, is_draining)
        runner = JobRunner(
            handler=cast("JobHandler", _Handler(self.fakes)),
            runs=runs,
            settler=self.settler,
            ledger=cast("Ledger", self.fakes),
            notifier=notifier,
            publisher=self.publisher,
            names=self.names,
            metrics=metrics,
            gate=StoreGate(Breaker("the store", 1), is_draining),
            leases=nothing,
            history=History(shows_prompts=False),
            tracing=Tracing(),
        )
        return Dispatcher(
            rules=RULES,
            runs=runs,
            runner=runner,
            settler=self.settler,
            isolation=isolation,
            names=self.names,
            metrics=metrics,
            num_threads=2,
            is_draining=is_draining,
            cancellations=self._cancellations,
            leases=nothing,
            lease_keeper=nothing,
            on_bug=self.fakes.note_bug,
        )


@dataclass
class Expected:
    """What must come of what was published."""

    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    dead: Counter[bytes] = field(default_factory=Counter)
    num_cancels: int = 0

    @property
    def num_deliveries(self) -> int:
        return self.ends.total() + self.dead.total()


def run(rabbitmq: RabbitMQ, num_deliveries: int, *, seed: int = SEED) -> dict[str, Any]:
    """Publish so many, check that each ends as it should, and return the figures."""
    started_at, expected = time.monotonic(), Expected()
    with Bench(rabbitmq) as bench:
        number = 0
        while expected.num_deliveries < num_deliveries:
            numbers = range(number, number + min(BATCH, num_deliveries - expected.num_deliveries))
            number = numbers.stop
            _publish_batch(bench, expected, [random.Random(f"{seed} delivery {one}") for one in numbers])
            bench.wait_until(
                lambda: bench.fakes.ends.total() + bench.fakes.dead.total() >= expected.num_deliveries,
                f"all of {expected.num_deliveries} ended",
            )
        rng = random.Random(f"{seed} letters")
        for _ in range(NUM_LETTERS):
            bench.publish(fuzzed_properties(rng), rng.randbytes(20), queue=bench.names.dead)
        num_letters = expected.dead.total() + NUM_LETTERS
        bench.wait_until(lambda: bench.letters_shown() == num_letters, f"all of {num_letters} letters shown")
        assert (bench.fakes.ends, bench.fakes.dead) == (expected.ends, expected.dead)
        assert (bench.num_lost, bench.fakes.num_bugs, bench.ready()) == (0, 0, 0)
        assert bench.num_received == expected.num_cancels
        outcomes = Counter(code for _, code in bench.fakes.ends.elements())
        return {
            "deliveries": bench.num_delivered,
            "orders": bench.num_received,
            "refused by the broker": bench.num_refused,
            "connections lost": bench.num_lost,
            "letters shown": num_letters,
            "outcomes": dict(outcomes) | {"dead letter": bench.fakes.dead.total()},
            "seconds": round(time.monotonic() - started_at, 1),
        }


def _publish_batch(bench: Bench, expected: Expected, numbers: list[random.Random]) -> None:
    """Publish the cancel orders first, so that each is received before the job that it names."""
    task_ids = [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for rng in numbers]
    cancelled = {task_id for rng, task_id in zip(numbers, task_ids, strict=True) if rng.random() < CANCELLED_SHARE}
    for task_id in cancelled:
        order = json.dumps({"task_id": task_id}).encode()
        bench.publish(fuzzed_properties(random.Random(task_id)), order, exchange=bench.names.cancel_exchange)
    expected.num_cancels += len(cancelled)
    bench.wait_until(lambda: bench.num_received == expected.num_cancels, "all orders heard")

    for rng, task_id in zip(numbers, task_ids, strict=True):
        is_unreadable = rng.random() < UNREADABLE_SHARE
        data = {"generation_id": rng.randrange(1, 2**63), "prompt": "a fox"}
        body = rng.randbytes(40) if is_unreadable else json.dumps({"task_id": task_id, "data": data}).encode()
        if rng.random() < DAMAGED_SHARE:
            if not bench.try_publish(damaged_properties(rng), body):
                continue
        else:
            bench.publish(fuzzed_properties(rng), body)
        if is_unreadable:
            expected.dead[body] += 1
        else:
            expected.ends[task_id, "CANCELLED" if task_id in cancelled else "complete"] += 1


def main() -> None:
    """Run the long form and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deliveries", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=SEED)
    decoded = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, RabbitMQ(Path(folder)) as rabbitmq:
        figures = {"seed": decoded.seed} | run(rabbitmq, decoded.deliveries, seed=decoded.seed)
    Console().print(json.dumps(figures), soft_wrap=True)


if __name__ == "__main__":
    main()
