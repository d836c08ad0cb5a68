"""The CPU of the supervisor for a job, thread by thread: `python -m benchmarks.overhead --by-thread`.

Broker, store, HTTP and the worker are real. The engine's process is the stand-in of the fault tests, which takes a step
in 5 ms and draws noise, so that the machine's cores are free for the supervisor. Half of the rounds publish all jobs at
once, as a busy queue does; in the others each job is published when the one before has ended. CPU is the kernel's
count of nanoseconds for each thread; what ended threads took is the rest of the process's own.
"""

import os
import platform
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from examples.demo.signatures import draw_signatures
from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.station import start_light_worker
from tests.support.world import World, new_world

STEPS = 20
MAX_LANES = 10
STYLES = ("neon", "blueprint", "sepia")
ENDED, ALL = "ended threads", "all threads"
# Threads of one kind are numbered, and the kernel keeps 15 characters of a name.
_NUMBER = re.compile(r"[-_ ]?\d.*$")

Seconds = dict[str, float]


def measure_by_thread(folder: Path, *, num_rounds: int, num_jobs: int) -> dict[str, Any]:
    """Return the median, least and most CPU seconds a job of each thread, jobs at once and one after another."""
    with (
        RabbitMQ(folder / "rabbitmq") as rabbitmq,
        SeaweedFS(folder / "seaweedfs") as store,
        new_world(rabbitmq, store, folder) as world,
    ):
        for style in STYLES:
            world.upload_demo_adapter(style)
        world.upload("signatures/a.png", next(iter(draw_signatures(folder).values())).read_bytes())
        worker = start_light_worker(world, FAULTS_NAMES="1", MAX_CONCURRENT_GENERATIONS=str(MAX_LANES))
        ways: dict[str, Callable[[], None]] = {
            "at once": lambda: _run_at_once(world, num_jobs),
            "one by one": lambda: _run_one_by_one(world, num_jobs),
        }
        for way in ways.values():
            way()  # warm-up: caches, connections, threads
        rounds: dict[str, list[Seconds]] = {name: [] for name in ways}
        for _ in range(num_rounds):
            for name, way in ways.items():
                before = thread_seconds(worker.process.pid)
                way()
                after = thread_seconds(worker.process.pid)
                rounds[name].append({thread: (after[thread] - before.get(thread, 0.0)) / num_jobs for thread in after})
    return {
        "benchmark": "supervisor",
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "rounds": num_rounds,
        "jobs_a_round": num_jobs,
        "steps": STEPS,
        "cpu_seconds_a_job": {name: _spreads(measured) for name, measured in rounds.items()},
    }


def thread_seconds(pid: int) -> Seconds:
    """Return the CPU seconds of the process's threads by name, those of one kind together."""
    found: Counter[str] = Counter()
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            name = _NUMBER.sub("", (task / "comm").read_text().strip())
            found[name] += int((task / "schedstat").read_text().split()[0])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
    times = psutil.Process(pid).cpu_times()
    everything = times.user + times.system
    seconds = {name: nanoseconds / 1e9 for name, nanoseconds in found.items()}
    return seconds | {ENDED: everything - sum(seconds.values()), ALL: everything}


def print_by_thread(result: dict[str, Any]) -> None:
    """Print a table of each way, the busiest threads first, without those below a hundredth of a millisecond."""
    for way, spreads in result["cpu_seconds_a_job"].items():
        table = Table("thread", "median", "min", "max", title=f"supervisor's CPU in ms a job, jobs {way}")
        for name, spread in sorted(spreads.items(), key=lambda item: -item[1]["median"]):
            if spread["max"] >= 1e-5:
                table.add_row(name, *(f"{1000 * spread[key]:.2f}" for key in ("median", "min", "max")))
        Console().print(table)


def _run_at_once(world: World, num_jobs: int) -> None:
    for generation_id in [_publish(world, number) for number in range(num_jobs)]:
        assert world.wait_for_end(generation_id).kind == "complete"
    world.wait_until_clean()


def _run_one_by_one(world: World, num_jobs: int) -> None:
    for number in range(num_jobs):
        assert world.wait_for_end(_publish(world, number)).kind == "complete"
    world.wait_until_clean()


def _publish(world: World, seed: int) -> int:
    style = STYLES[seed % len(STYLES)]
    return world.publish(
        prompt=f"{style}: a red fox",
        lora_path=f"models/{style}.safetensors",
        signature_path="signatures/a.png",
        num_inference_steps=STEPS,
        seed=seed,
    )


def _spreads(rounds: list[Seconds]) -> dict[str, dict[str, float]]:
    values: dict[str, list[float]] = defaultdict(list)
    for measured in rounds:
        for name, seconds in measured.items():
            values[name].append(seconds)
    return {
        name: {"median": statistics.median(found), "min": min(found), "max": max(found)}
        for name, found in values.items()
    }
