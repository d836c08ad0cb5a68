"""How long express and ordinary jobs wait in one queue, and in two by weight: seconds, and turns, seen from outside.

`python -m benchmarks.queues`. Broker, store, HTTP and the worker are real; the engine's process is the stand-in of the
fault tests, which draws noise at once, so that seconds say something side by side alone. Turns do not depend on the
machine: a job's turn is its place among all starts. All jobs are published in a shuffled order before the worker
starts. Expected of weights 3:1: express jobs have three of four turns until none is left, so that the last of n has
turn 4n/3, and between two ordinary ones are three others.
"""

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import uuid
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pika
from rich.console import Console
from rich.table import Table

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.station import start_light_worker
from tests.support.world import World, eventually, new_world

EXPRESS, ORDINARY = "express", "ordinary"
NUM_LANES = 4


class Start(NamedTuple):
    """The start of a job of a class, its turn among all starts (1-based), and seconds since the worker's first look."""

    kind: str
    turn: int
    seconds: float


def main() -> None:
    """Run both rounds, print the table and, last, the line of JSON."""
    arguments = _arguments()
    classes = [EXPRESS] * arguments.express + [ORDINARY] * (arguments.jobs - arguments.express)
    random.Random(arguments.seed).shuffle(classes)
    weights = (arguments.weight, 1)
    with tempfile.TemporaryDirectory() as name, RabbitMQ(Path(name) / "rabbitmq") as rabbitmq:
        folder = Path(name)
        with SeaweedFS(folder / "seaweedfs") as store:
            rounds = {}
            for label, chosen in (("one queue", None), (f"two, {arguments.weight}:1", weights)):
                (folder / label).mkdir()
                with new_world(rabbitmq, store, folder / label) as world:
                    rounds[label] = start_order(world, classes, weights=chosen)
    summaries = {
        label: {kind: _summary(starts, kind) for kind in (EXPRESS, ORDINARY)} for label, starts in rounds.items()
    }
    _print_table(summaries)
    line = json.dumps(
        {
            "benchmark": "queues",
            "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
            "jobs": arguments.jobs,
            "lanes": NUM_LANES,
            "rounds": summaries,
        }
    )
    if arguments.out is not None:
        arguments.out.write_text(line + "\n")
    print(line)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=200, help="of both classes")
    parser.add_argument("--express", type=int, default=50, help="of them")
    parser.add_argument("--weight", type=int, default=3, help="of express jobs; ordinary ones have 1")
    parser.add_argument("--seed", type=int, default=1, help="of the order in which they are published")
    parser.add_argument("--out", type=Path, help="file for the line of JSON")
    return parser.parse_args()


def start_order(world: World, classes: Sequence[str], *, weights: tuple[int, int] | None) -> list[Start]:
    """Publish a job of each class, start a worker and wait for their ends; return the starts in their order.

    `weights` of express and ordinary jobs; None: all of them are in one queue.
    """
    express = f"{world.queue}.express"
    queues = {EXPRESS: express if weights else world.queue, ORDINARY: world.queue}
    kinds = {str(uuid.uuid4()): kind for kind in classes}
    _publish(world, {task_id: queues[kind] for task_id, kind in kinds.items()})
    env = {"RABBITMQ_QUEUES": f"{express}:{weights[0]},{world.queue}:{weights[1]}"} if weights else {}
    worker = start_light_worker(world, MAX_CONCURRENT_GENERATIONS=str(NUM_LANES), **env)

    def num_ends() -> int:
        return len(world.backend.calls("complete")) + len(world.backend.calls("failed"))

    eventually(lambda: num_ends() == len(classes), worker.log_tail)
    assert world.backend.calls("failed") == []
    began_at = _time(worker.events("consuming")[0])
    lines = sorted(worker.events("job in"), key=_time)
    assert len(lines) == len(classes), "no job comes twice"
    world.stop()
    return [Start(kinds[line["task_id"]], turn, _time(line) - began_at) for turn, line in enumerate(lines, 1)]


def longest_gap(starts: Sequence[Start], kind: str) -> int:
    """Return the most turns from one start of the class to the next, the first counted from the beginning."""
    turns = [0, *(start.turn for start in starts if start.kind == kind)]
    return max(later - earlier for earlier, later in pairwise(turns))


def _publish(world: World, queues: dict[str, str]) -> None:
    with pika.BlockingConnection(pika.URLParameters(world.rabbitmq.url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        for name in set(queues.values()):
            channel.queue_declare(name, durable=True)
        for number, (task_id, queue) in enumerate(queues.items(), 1):
            fields = {"generation_id": number, "prompt": "a fox", "num_inference_steps": 8}
            body = json.dumps({"task_id": task_id, "data": fields}).encode()
            channel.basic_publish("", queue, body, pika.BasicProperties(delivery_mode=2))


def _time(line: dict[str, Any]) -> float:
    return datetime.fromisoformat(line["time"]).timestamp()


def _summary(starts: Sequence[Start], kind: str) -> dict[str, Any]:
    chosen = [start for start in starts if start.kind == kind]
    seconds = sorted(start.seconds for start in chosen)
    return {
        "jobs": len(chosen),
        "wait_seconds": {
            "median": round(statistics.median(seconds), 2),
            "p95": round(seconds[int(0.95 * (len(seconds) - 1))], 2),
            "slowest": round(seconds[-1], 2),
        },
        "median_turn": statistics.median(start.turn for start in chosen),
        "last_turn": chosen[-1].turn,
        "longest_gap_turns": longest_gap(starts, kind),
    }


def _print_table(summaries: dict[str, dict[str, dict[str, Any]]]) -> None:
    columns = ("", "class", "jobs", "wait, median", "p95", "slowest", "median turn", "last turn", "longest gap")
    table = Table(*columns, title="Seconds, and turns, until a job starts")
    for label, by_kind in summaries.items():
        for kind, one in by_kind.items():
            waits = (f"{value:.2f}" for value in one["wait_seconds"].values())
            turns = (f"{one[name]:.0f}" for name in ("median_turn", "last_turn", "longest_gap_turns"))
            table.add_row(label, kind, str(one["jobs"]), *waits, *turns)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
