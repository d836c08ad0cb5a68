"""A load of four sizes: how long jobs take beside what each takes alone, by size, under Poisson arrivals.

Only lanes of one size share a forward, so that sizes compete. A job's slowdown is its time from arrival to image over
that of the same job alone on an idle engine; fairness is Jain's index of all slowdowns (Jain, Chiu and Hawe, 1984): 1
where all are equal, 1/n where one of n jobs has all of it. Jobs arrive by process time, for neighbours on the machine
take none of it: while the engine is idle, that clock is put forward to the next arrival.
"""

import dataclasses
import itertools
import math
import queue
import random
import statistics
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import pairwise
from typing import Any, NamedTuple

from rich.table import Table

from benchmarks.batching.bench import NUM_JOBS, Bench, Engine
from inference.lane import Lane
from inference.request import EngineLoad, GenerationRequest, GenerationResult, StepReport

STEPS = 8
JOBS = 80
# Of the throughput that full batches of one size each would have.
LOADS = (0.5, 0.7, 0.9)
ALONE_REPEATS = 3
SEED = 0


class MixedSize(NamedTuple):
    """Pixels of a size, and its share of the jobs."""

    width: int
    height: int
    share: float

    @property
    def name(self) -> str:
        return f"{self.width}x{self.height}"


SIZES = (MixedSize(128, 128, 0.4), MixedSize(64, 128, 0.25), MixedSize(96, 96, 0.2), MixedSize(64, 64, 0.15))


class Calibration(NamedTuple):
    """Seconds of a job of each size: alone on an idle engine, and its part of a full batch."""

    alone: dict[str, float]
    in_full_batch: dict[str, float]

    def rate(self, load: float) -> float:
        """Return the arrivals a second that are this share of what full batches could do."""
        return load / sum(size.share * self.in_full_batch[size.name] for size in SIZES)


class Arrival(NamedTuple):
    """A job that arrives `at` seconds after the start."""

    at: float
    size: MixedSize


class Finished(NamedTuple):
    """A job of a size: seconds from arrival to image, and the longest from one step's end to the next one's."""

    size: str
    seconds: float
    longest_step_seconds: float


def measure_mixed(bench: Bench) -> dict[str, Any]:
    """Measure every load on one engine."""
    with Engine(bench) as engine:
        calibration = calibrate(bench, engine)
        return {
            "case": "four sizes",
            "model": bench.name,
            "steps": STEPS,
            "shares": {size.name: size.share for size in SIZES},
            "seconds_alone": calibration.alone,
            "loads": [measure_load(bench, engine, calibration, load) for load in LOADS],
        }


def calibrate(bench: Bench, engine: Engine) -> Calibration:
    """Time jobs of each size alone and in a full batch, after one that warms up."""
    alone: dict[str, float] = {}
    in_full_batch: dict[str, float] = {}
    for size in SIZES:
        requests = [_request(bench, size, number) for number in range(NUM_JOBS)]
        _seconds_together(bench, engine, requests)
        in_full_batch[size.name] = _seconds_together(bench, engine, requests) / NUM_JOBS
        alone[size.name] = statistics.median(
            _seconds_together(bench, engine, requests[:1]) for _ in range(ALONE_REPEATS)
        )
    return Calibration(alone, in_full_batch)


def measure_load(bench: Bench, engine: Engine, calibration: Calibration, load: float) -> dict[str, Any]:
    """Submit the seeded arrivals at `load` and summarize how long they took, by size and in all."""
    forwards = _record_forwards(engine)
    source = LoadSource(bench, engine, arrivals(random.Random(SEED), JOBS, calibration.rate(load)))
    finished = source.run()
    slowdowns = [job.seconds / calibration.alone[job.size] for job in finished]
    return {
        "load": load,
        "jobs_per_second": len(finished) / source.now,
        "busy": source.busy_seconds / source.now,
        "mean_lanes": statistics.mean(num_lanes for _, num_lanes in forwards),
        "slowdown": median_and_p95(slowdowns),
        "jain_index": jain_index(slowdowns),
        "sizes": {size.name: _summary(size.name, finished, forwards, calibration) for size in SIZES},
    }


class LoadSource:
    """Owner of the jobs to come and of their clock. Submits them between the engine's turns, on the engine's thread."""

    def __init__(self, bench: Bench, engine: Engine, to_come: Sequence[Arrival]) -> None:
        self._bench = bench
        self._engine = engine
        self._to_come = deque(to_come)
        self._num_submitted = 0
        self._num_running = 0
        self._ended: queue.SimpleQueue[Finished | BaseException] = queue.SimpleQueue()
        self._started_at = bench.clock()
        self._skipped_seconds = 0.0

    @property
    def busy_seconds(self) -> float:
        """Process time since the start."""
        return self._bench.clock() - self._started_at

    @property
    def now(self) -> float:
        """Seconds since the start, idle ones included."""
        return self.busy_seconds + self._skipped_seconds

    def run(self) -> list[Finished]:
        """Submit all jobs to the idle engine and wait for them."""
        loop, num_jobs = self._engine.local.default.loop, len(self._to_come)
        plain_step = loop.step

        def step() -> EngineLoad:
            engine_load = plain_step()
            self._submit_due()
            return engine_load

        loop.step = step  # type: ignore[method-assign]
        try:
            self._submit_next()
            return [self._next_ended() for _ in range(num_jobs)]
        finally:
            loop.step = plain_step  # type: ignore[method-assign]

    def _next_ended(self) -> Finished:
        ended = self._ended.get()
        if isinstance(ended, BaseException):
            raise ended
        return ended

    def _submit_due(self) -> None:
        while self._to_come and (self._to_come[0].at <= self.now or not self._num_running):
            self._submit_next()

    def _submit_next(self) -> None:
        arrival = self._to_come.popleft()
        self._skipped_seconds += max(0.0, arrival.at - self.now)
        reported_at: list[float] = []

        def on_step(_: StepReport) -> None:
            reported_at.append(self.now)

        def on_done(future: "Future[GenerationResult]") -> None:
            self._num_running -= 1
            error = future.exception()
            longest = max((later - earlier for earlier, later in pairwise(reported_at)), default=0.0)
            self._ended.put(error or Finished(arrival.size.name, self.now - arrival.at, longest))

        request = _request(self._bench, arrival.size, self._num_submitted)
        self._num_submitted += 1
        self._num_running += 1
        self._engine.local.generate(request, on_step, lambda: False).add_done_callback(on_done)


def arrivals(chance: random.Random, num_jobs: int, rate: float) -> list[Arrival]:
    """Return Poisson arrivals, `rate` a second, each of a size by its share."""
    times = itertools.accumulate(chance.expovariate(rate) for _ in range(num_jobs))
    return [Arrival(at, chance.choices(SIZES, [size.share for size in SIZES])[0]) for at in times]


def jain_index(values: Sequence[float]) -> float:
    """Return Jain's fairness index of `values`."""
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))


def median_and_p95(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the 95th percentile: the value that 95 % are not above."""
    return {"median": statistics.median(values), "p95": sorted(values)[math.ceil(0.95 * len(values)) - 1]}


def tables(result: dict[str, Any]) -> list[Table]:
    """Return a table of sizes for each load."""
    return [_table(result["model"], load) for load in result["loads"]]


def _request(bench: Bench, size: MixedSize, number: int) -> GenerationRequest:
    request = bench.request(bench.jobs[number % NUM_JOBS], steps=STEPS)
    return dataclasses.replace(request, width=size.width, height=size.height)


def _seconds_together(bench: Bench, engine: Engine, requests: Sequence[GenerationRequest]) -> float:
    started_at = bench.clock()
    for future in [engine.local.generate(request, lambda _: None, lambda: False) for request in requests]:
        future.result()
    return bench.clock() - started_at


def _record_forwards(engine: Engine) -> list[tuple[str, int]]:
    """Record each forward's size and lanes from now on."""
    model, forwards = engine.local.default.family, list[tuple[str, int]]()
    plain_denoise = type(model).denoise

    def denoise(lanes: Sequence[Lane]) -> Any:
        request = lanes[0].owner.request
        forwards.append((f"{request.width}x{request.height}", len(lanes)))
        return plain_denoise(model, lanes)

    model.denoise = denoise  # type: ignore[method-assign]
    return forwards


def _summary(
    size: str, finished: Sequence[Finished], forwards: Sequence[tuple[str, int]], calibration: Calibration
) -> dict[str, Any]:
    jobs = [job for job in finished if job.size == size]
    seconds = [job.seconds for job in jobs]
    return {
        "jobs": len(jobs),
        "seconds": median_and_p95(seconds),
        "slowdown": median_and_p95([one / calibration.alone[size] for one in seconds]),
        "mean_lanes": statistics.mean(num_lanes for name, num_lanes in forwards if name == size),
        "longest_step_seconds": median_and_p95([job.longest_step_seconds for job in jobs]),
    }


def _table(model: str, load: dict[str, Any]) -> Table:
    columns = ("size", "jobs", "seconds, median", "p95", "slowdown, median", "p95", "lanes a forward", "longest step")
    title = f"{model}, load {load['load']}: Jain's index {load['jain_index']:.2f}, {load['jobs_per_second']:.2f} jobs/s"
    table = Table(*columns, title=title)
    for name, one in load["sizes"].items():
        times = (f"{one[key][part]:.2f}" for key in ("seconds", "slowdown") for part in ("median", "p95"))
        pause = f"{one['longest_step_seconds']['median']:.2f}"
        table.add_row(name, str(one["jobs"]), *times, f"{one['mean_lanes']:.1f}", pause)
    slowdowns = (f"{load['slowdown'][part]:.2f}" for part in ("median", "p95"))
    table.add_row("all", str(JOBS), "", "", *slowdowns, f"{load['mean_lanes']:.1f}", "")
    return table
