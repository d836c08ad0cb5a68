"""New adapters and jobs that come while others are drawn: what they wait for, and what the others wait for them."""

import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch

from benchmarks.gpu.models.engine import BenchEngine
from benchmarks.gpu.speed.baselines import Baseline
from benchmarks.gpu.speed.forwards import Forwards
from benchmarks.gpu.stage import Context, Figures
from benchmarks.sets import Job
from inference.request import StepReport

NUM_SWAPS = 5
TINY_SWAPS = 1
# Each takes more than a second on SDXL.
DIFFUSERS_SWAPS = 3
JOIN_STEPS = 10
# The step of the others at which a job arrives.
ARRIVAL_STEP = 3


def measure_swaps(context: Context, forwards: Forwards, path: Path) -> Figures:
    """Time one adapter from its file to usable, into other pages each time; the lanes wait while it is written."""
    with torch.inference_mode():
        swaps = [_swap(context, forwards, path, number) for number in range(_num_swaps(context) + 1)]
    # The first makes room and warms caches.
    kinds = zip(("read_ms", "pack_ms", "write_while_lanes_wait_ms"), zip(*swaps[1:], strict=True), strict=True)
    return {"first_ms": list(swaps[0]), **{name: statistics.median(times) for name, times in kinds}}


def _swap(context: Context, forwards: Forwards, path: Path, number: int) -> tuple[float, float, float]:
    """Return the milliseconds of reading, packing and writing."""
    family = forwards.family
    context.synchronize()
    started_at = time.perf_counter()
    adapter = family.read_adapter(path, None)
    read_at = time.perf_counter()
    packed = family.pack(adapter)
    context.synchronize()
    packed_at = time.perf_counter()
    # Beyond the set's own pages.
    first = _num_pages(forwards) + 1 + number % 2 * packed.num_pages
    family.bank.write(tuple(range(first, first + packed.num_pages)), packed)
    context.synchronize()
    written_at = time.perf_counter()
    return (read_at - started_at) * 1000, (packed_at - read_at) * 1000, (written_at - packed_at) * 1000


def measure_diffusers_swaps(context: Context, baseline: Baseline, path: Path) -> Figures:
    """Time diffusers' load and unload of the same adapter, from host memory."""
    state = safetensors.torch.load_file(path)
    loading, unloading = [], []
    for _ in range(min(_num_swaps(context), DIFFUSERS_SWAPS) + 1):
        context.synchronize()
        started_at = time.perf_counter()
        baseline.pipeline.load_lora_weights(dict(state), adapter_name="swapped")
        context.synchronize()
        loaded_at = time.perf_counter()
        baseline.pipeline.unload_lora_weights()
        loading.append(loaded_at - started_at)
        unloading.append(time.perf_counter() - loaded_at)
    return {
        "load_ms": statistics.median(loading[1:]) * 1000,
        "unload_ms": statistics.median(unloading[1:]) * 1000,
        "first_load_ms": loading[0] * 1000,
    }


def measure_join(engine: BenchEngine, running: Sequence[Job], joiner: Job) -> Figures:
    """Time the arrival of a job with an adapter new to the engine while `running` are drawn, a lane being free."""
    has_come_so_far = threading.Event()
    steps: list[float] = []
    joined: list[float] = []

    def watch(report: StepReport) -> None:
        if report.step_index:
            steps.append(report.seconds)
        if report.step_index == ARRIVAL_STEP:
            has_come_so_far.set()

    futures = [engine.submit(running[0], watch, steps=JOIN_STEPS)]
    futures += [engine.submit(job, steps=JOIN_STEPS) for job in running[1:]]
    futures[0].add_done_callback(lambda _: has_come_so_far.set())  # an error must not leave us waiting
    has_come_so_far.wait()
    num_before, asked_at = len(steps), time.perf_counter()
    last = engine.submit(joiner, lambda report: joined.append(time.perf_counter()), steps=ARRIVAL_STEP)
    for future in [*futures, last]:
        future.result()
    preparation = {stage.name: stage.seconds for stage in last.result().stages if stage.name in ("adapt", "encode")}
    step = statistics.median(steps[1:])
    return {
        "step_ms": step * 1000,
        # Of the others: the longest from the arrival on, what it is longer than the median by is the stall.
        "longest_step_ms": max(steps[num_before:]) * 1000,
        "stall_ms": (max(steps[num_before:]) - step) * 1000,
        "first_step_after_ms": (joined[0] - asked_at) * 1000,
        **{f"{name}_ms": seconds * 1000 for name, seconds in preparation.items()},
        "wait_in_steps": (joined[0] - asked_at - sum(preparation.values())) / step,
    }


def _num_swaps(context: Context) -> int:
    return TINY_SWAPS if context.is_tiny else NUM_SWAPS


def _num_pages(forwards: Forwards) -> int:
    return max((max(applied.pages) for row in forwards.rows for applied in row), default=0)
