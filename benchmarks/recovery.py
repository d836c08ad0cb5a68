"""How long it takes until a job is at work again after a part has failed: seconds, seen from outside.

`python -m benchmarks.recovery`. Broker, store, HTTP and processes are real; the engine's process is the stand-in of the
fault tests, which has no model to load, so that a model's loading time comes on top wherever an engine starts anew.
What is waited for is always the same: that an engine begins to draw the job. Expected: what needs no waiting for a
heartbeat stays below one second, a worker's start costs two, and silence costs two to three heartbeats.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.station import Job, Station, new_station
from tests.support.world import Worker, eventually

HEARTBEAT_SECONDS = 20  # the worker's default
PATIENCE_SECONDS = 120.0
POLL_SECONDS = 0.002


def main() -> None:
    """Run the rounds, print the table and, last, the line of JSON."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as name, RabbitMQ(Path(name) / "rabbitmq") as rabbitmq:
        folder = Path(name)
        with SeaweedFS(folder / "seaweedfs") as store:
            seconds = {
                fault: [_round(measure, rabbitmq, store, folder / f"{number}-{turn}") for turn in range(num_rounds)]
                for number, (fault, (measure, num_rounds)) in enumerate(_faults(arguments).items())
            }
    _print_table(seconds)
    line = json.dumps(
        {
            "benchmark": "recovery",
            "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
            "heartbeat_seconds": HEARTBEAT_SECONDS,
            "seconds": {fault: _spread(values) for fault, values in seconds.items()},
        }
    )
    if arguments.out is not None:
        arguments.out.write_text(line + "\n")
    print(line)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="of what is quick")
    parser.add_argument("--slow-rounds", type=int, default=2, help="of what waits for heartbeats")
    parser.add_argument("--out", type=Path, help="file for the line of JSON")
    return parser.parse_args()


Measure = Callable[[Station], float]


def _faults(arguments: argparse.Namespace) -> dict[str, tuple[Measure, int]]:
    return {
        "connection closed by the broker": (_connection_closed, arguments.rounds),
        "broker killed; from its return": (_broker_killed, arguments.rounds),
        "engine killed": (_engine_killed, arguments.rounds),
        "worker killed, another is there": (_worker_killed, arguments.rounds),
        "worker killed and started anew": (_worker_started_anew, arguments.rounds),
        "broker hangs; until it is noticed": (_broker_hangs, arguments.slow_rounds),
        "worker's host gone, another is there": (_host_gone, arguments.slow_rounds),
    }


def _round(measure: Measure, rabbitmq: RabbitMQ, store: SeaweedFS, folder: Path) -> float:
    folder.mkdir()
    with new_station(rabbitmq, store, folder) as station:
        station.world.queues()  # opens the console, which takes a moment
        return measure(station)


def _connection_closed(station: Station) -> float:
    _start_worker(station)
    failed_at = time.monotonic()
    station.world.rabbitmq.close_connections()
    _wait_until_begun(station, station.publish())
    return time.monotonic() - failed_at


def _broker_killed(station: Station) -> float:
    worker = _start_worker(station)
    station.world.rabbitmq.kill()
    eventually(lambda: "broker" in worker.get("/health/ready")[1], within_seconds=PATIENCE_SECONDS)
    station.world.rabbitmq.start()
    back_at = time.monotonic()
    _wait_until_begun(station, station.publish())
    return time.monotonic() - back_at


def _engine_killed(station: Station) -> float:
    worker = _start_worker(station)
    job = station.publish_held()
    failed_at = time.monotonic()
    os.kill(worker.engine_pid(), signal.SIGKILL)
    _wait_until_begun(station, job, times=2)
    return time.monotonic() - failed_at


def _worker_killed(station: Station) -> float:
    worker = _start_worker(station)
    job = station.publish_held()
    _start_worker(station)
    failed_at = time.monotonic()
    worker.kill()
    _wait_until_begun(station, job, times=2)
    return time.monotonic() - failed_at


def _worker_started_anew(station: Station) -> float:
    worker = _start_worker(station)
    job = station.publish_held()
    failed_at = time.monotonic()
    worker.kill()
    station.world.start_worker(**station.env())
    _wait_until_begun(station, job, times=2)
    return time.monotonic() - failed_at


def _broker_hangs(station: Station) -> float:
    worker = _start_worker(station)
    broker = station.world.rabbitmq.pid
    os.kill(broker, signal.SIGSTOP)
    try:
        failed_at = time.monotonic()
        eventually(lambda: "broker" in worker.get("/health/ready")[1], within_seconds=PATIENCE_SECONDS)
        return time.monotonic() - failed_at
    finally:
        os.kill(broker, signal.SIGCONT)


def _host_gone(station: Station) -> float:
    _start_worker(station)
    job = station.publish_held()
    _start_worker(station, RABBITMQ_PORT=str(station.world.rabbitmq.port))
    failed_at = time.monotonic()
    station.broker.black_hole()
    _wait_until_begun(station, job, times=2)
    return time.monotonic() - failed_at


def _start_worker(station: Station, **env: str) -> Worker:
    return station.start_worker(RABBITMQ_HEARTBEAT_SECONDS=str(HEARTBEAT_SECONDS), **env)


def _wait_until_begun(station: Station, job: Job, times: int = 1) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while station.num_runs(job) < times:
        assert time.monotonic() < deadline, station.world.workers[-1].log_tail()
        time.sleep(POLL_SECONDS)


def _spread(values: list[float]) -> dict[str, Any]:
    return {
        "rounds": len(values),
        "median": round(statistics.median(values), 3),
        "slowest": round(max(values), 3),
    }


def _print_table(seconds: dict[str, list[float]]) -> None:
    table = Table("after this", "rounds", "median", "slowest", title="Seconds until a job is at work again")
    for fault, values in seconds.items():
        spread = _spread(values)
        table.add_row(fault, str(len(values)), f"{spread['median']:.2f}", f"{spread['slowest']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
