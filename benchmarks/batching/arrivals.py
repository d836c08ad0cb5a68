"""Jobs that arrive while others run: the wait for the first step, and latencies under Poisson arrivals."""

import math
import queue
import random
import statistics
import threading
import time
from typing import Any, NamedTuple

from benchmarks.batching.bench import NUM_JOBS, Bench, Engine
from inference.request import StepReport

JOIN_ARRIVALS = 20
JOIN_STEPS = 10
POISSON_JOBS = 40
POISSON_LOAD = 0.7


def measure_joining(bench: Bench, engine: Engine) -> dict[str, Any]:
    """Measure the steps from a job's arrival to the end of its first step, while one lane is free.

    The job arrives within a running step; its own loading and encoding are subtracted.
    """
    arrivals = [_measure_arrival(bench, engine, number) for number in range(JOIN_ARRIVALS)]
    waits = sorted(arrival.wait_steps for arrival in arrivals)
    return {
        "arrivals": len(waits),
        "median_steps": statistics.median(waits),
        "p99_steps": waits[math.ceil(0.99 * len(waits)) - 1],
        "median_preparation_seconds": statistics.median(arrival.preparation_seconds for arrival in arrivals),
        "step_seconds": statistics.median(arrival.step_seconds for arrival in arrivals),
    }


class Arrival(NamedTuple):
    """A job that arrived while others ran; `wait_steps` excludes its preparation."""

    wait_steps: float
    preparation_seconds: float
    step_seconds: float


def _measure_arrival(bench: Bench, engine: Engine, number: int) -> Arrival:
    joiner = bench.jobs[number % NUM_JOBS]
    are_running = threading.Event()
    reports: list[tuple[float, StepReport]] = []
    step_seconds: list[float] = []

    def watch(report: StepReport) -> None:
        step_seconds.append(report.seconds)
        if report.step_index == 3:
            are_running.set()

    futures = [engine.submit(job, watch, steps=JOIN_STEPS) for job in bench.jobs if job is not joiner]
    are_running.wait()
    step = statistics.median(step_seconds[-NUM_JOBS:])
    time.sleep(random.Random(number).random() * step)  # anywhere within a step
    submitted_at = time.perf_counter()
    joined = engine.submit(joiner, lambda report: reports.append((time.perf_counter(), report)), steps=3)
    for future in [*futures, joined]:
        future.result()
    seconds = {stage.name: stage.seconds for stage in joined.result().stages}
    preparation = seconds["adapt"] + seconds["encode"]
    return Arrival((reports[0][0] - submitted_at - preparation) / step, preparation, step)


def measure_poisson(bench: Bench, engine: Engine, seconds_for_ten: float) -> dict[str, Any]:
    """Measure job latencies under random arrivals at `POISSON_LOAD` of the measured throughput."""
    chance = random.Random(0)
    rate = POISSON_LOAD * NUM_JOBS / seconds_for_ten
    # A queue: a future's result is there before its callbacks have run.
    took = queue.SimpleQueue[float]()
    futures = []
    for number in range(POISSON_JOBS):
        time.sleep(chance.expovariate(rate))
        submitted_at = time.perf_counter()
        future = engine.submit(bench.jobs[number % NUM_JOBS])
        future.add_done_callback(lambda _, submitted_at=submitted_at: took.put(time.perf_counter() - submitted_at))
        futures.append(future)
    for future in futures:
        future.result()
    ordered = sorted(took.get() for _ in futures)
    p50, p99 = statistics.median(ordered), ordered[math.ceil(0.99 * len(ordered)) - 1]
    return {"jobs": POISSON_JOBS, "load": POISSON_LOAD, "p50": p50, "p99": p99, "p99_over_p50": p99 / p50}
