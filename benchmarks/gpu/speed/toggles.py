"""Stage 6: what single switches would be worth on Stable Diffusion 1.5 and SDXL, and a compiled loop of one job."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.clocks import Times, raise_clocks, time_calls
from benchmarks.gpu.models.bench_model import BenchModel, model_of, shared_copy
from benchmarks.gpu.models.jobs import NUM_JOBS, make_jobs
from benchmarks.gpu.speed.baselines import Baseline
from benchmarks.gpu.speed.forwards import Forwards
from benchmarks.gpu.speed.graphs import measure_captured_steps, measure_graph
from benchmarks.gpu.stage import Context, Figures
from benchmarks.sets import Job

# Lanes of the captured forwards: 2, 8 and 20 rows.
GRAPH_LANES = (1, 4, 10)
# Lanes of the engine's steps with captured forwards.
STEP_LANES = (1, 2, 4, 10)


def run(context: Context) -> None:
    """Measure each switch alone, the quick ones of both models before what has to be compiled."""
    raise_clocks(context)
    with tempfile.TemporaryDirectory() as folder:
        toggles = [_Toggles(context, model_of(name, is_tiny=context.is_tiny), folder) for name in ("sd15", "sdxl")]
        for one in toggles:
            one.measure_switches()
        for one in toggles:
            one.measure_compiled_blocks()
        toggles[0].measure_compiled_loop()


class _Toggles:
    """Owner of one model, and of forwards of it with every adapter of a set."""

    def __init__(self, context: Context, model: BenchModel, folder: str) -> None:
        self._context = context
        self._model = model
        self._pipeline = model.build(context.device, torch.bfloat16 if context.is_cuda else torch.float32)
        self._jobs = make_jobs(model, self._pipeline, Path(folder) / model.name)
        self._forwards = Forwards(model, shared_copy(self._pipeline), context.device, self._jobs)

    def measure_switches(self) -> None:
        name = self._model.name
        self._measure(f"{name} cuDNN's attention first", lambda: self._both_ways(self._other_attention))
        self._measure(f"{name} cudnn.benchmark", lambda: self._both_ways(_cudnn_benchmark))
        for lanes in GRAPH_LANES:
            work = partial(measure_graph, self._context, self._forwards, lanes)
            self._measure(f"{name} CUDA graph of {lanes * self._model.rows_per_lane} rows", work)
        for lanes in STEP_LANES:
            work = partial(measure_captured_steps, self._context, self._forwards, lanes)
            self._measure(f"{name} captured step of {lanes} lanes", work)

    def measure_compiled_blocks(self) -> None:
        self._measure(f"{self._model.name} compiled blocks", self._compiled_blocks)

    def measure_compiled_loop(self) -> None:
        self._measure(f"{self._model.name} compiled diffusers, one job", self._compiled_loop)

    def _measure(self, name: str, work: Callable[[], Figures]) -> None:
        self._context.measure(name, work, needs_cuda=True)

    def _both_ways(self, other_way: Callable[[], Any]) -> Figures:
        """Time a step of ten lanes with adapters as it is, and inside `other_way`."""
        usual = self._time_step()
        with other_way():
            changed = self._time_step()
        return {
            "usual_ms": usual.steady_ms,
            "changed_ms": changed.steady_ms,
            "ratio": changed.steady_ms / usual.steady_ms,
        }

    def _time_step(self) -> Times:
        return time_calls(self._context, lambda: self._forwards.step(NUM_JOBS, has_adapters=True), warm_ups=3)

    @contextmanager
    def _other_attention(self) -> Iterator[None]:
        """Use the order of attention kernels that the family has not chosen."""
        order = self._forwards.family._attention
        order.is_cudnn_first = not order.is_cudnn_first
        try:
            yield
        finally:
            order.is_cudnn_first = not order.is_cudnn_first

    def _compiled_blocks(self) -> Figures:
        """Time the transformer blocks compiled each by itself, in a model without adapters."""
        plain = [Job(job.prompt, job.seed, ()) for job in self._jobs]
        forwards = Forwards(self._model, shared_copy(self._pipeline), self._context.device, plain)
        usual = time_calls(self._context, lambda: forwards.step(NUM_JOBS, has_adapters=False))
        before = forwards.step(NUM_JOBS, has_adapters=False)
        started_at = time.monotonic()
        forwards.denoiser.compile_repeated_blocks(fullgraph=True)
        after = forwards.step(NUM_JOBS, has_adapters=False)
        self._context.synchronize()
        compiling = time.monotonic() - started_at
        changed = time_calls(self._context, lambda: forwards.step(NUM_JOBS, has_adapters=False))
        differences = [float((one - other).norm() / one.norm()) for one, other in zip(before, after, strict=True)]
        return {
            "compile_seconds": compiling,
            "usual_ms": usual.steady_ms,
            "changed_ms": changed.steady_ms,
            "ratio": changed.steady_ms / usual.steady_ms,
            "largest_difference": max(differences),
        }

    def _compiled_loop(self) -> Figures:
        """Time one job without adapters in the UNet compiled whole."""
        baseline = Baseline(self._model, shared_copy(self._pipeline), self._context.device)
        job = Job(self._jobs[0].prompt, self._jobs[0].seed, ())
        baseline.draw(job)
        usual = self._seconds_of(lambda: baseline.draw(job))
        baseline.pipeline.unet.compile()
        compiling = self._seconds_of(lambda: baseline.draw(job, steps=2))
        return {"compile_seconds": compiling, "usual": usual, "compiled": self._seconds_of(lambda: baseline.draw(job))}

    def _seconds_of(self, work: Callable[[], Any]) -> float:
        started_at = time.monotonic()
        work()
        self._context.synchronize()
        return time.monotonic() - started_at


@contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    """Have cuDNN time its convolutions for every new shape and keep the fastest."""
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = False
