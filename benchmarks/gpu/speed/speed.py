"""Stages 2, 3 and 4: one model at full size, from whether it is right in 16 bits to what a set of ten jobs takes."""

import gc
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.clocks import raise_clocks, time_calls
from benchmarks.gpu.models.bench_model import model_of, shared_copy
from benchmarks.gpu.models.engine import BenchEngine
from benchmarks.gpu.models.jobs import NUM_JOBS, make_jobs
from benchmarks.gpu.speed.accuracy import Accuracy
from benchmarks.gpu.speed.arrivals import measure_diffusers_swaps, measure_join, measure_swaps
from benchmarks.gpu.speed.baselines import Baseline, CompiledBaseline
from benchmarks.gpu.speed.forwards import Forwards
from benchmarks.gpu.speed.sets import TINY_JOBS, Sets
from benchmarks.gpu.speed.steps import measure_memory, measure_steps, profile_step
from benchmarks.gpu.stage import Context, Figures
from benchmarks.sets import Job

# An adapter of rank 16 on all linear layers.
SWAPPED = 5
# In containers it is often of 64 MB, which writing beyond ends the process.
MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108 - a folder of our own is made in it
ADAPTER_ROOM_BYTES = 8e9
# Compiling takes longer than this; what is left of the box ends it otherwise.
COMPILE_SECONDS = 30.0


class Speed:
    """Owner of a model's parameters and of everything that runs on them."""

    def __init__(self, context: Context, name: str, folder: Path) -> None:
        started_at = time.monotonic()
        self.context = context
        self.model = model_of(name, is_tiny=context.is_tiny)
        # On a CPU, where only the code is rehearsed, 16 bits are many times slower than 32.
        self.pipeline = self.model.build(context.device, torch.bfloat16 if context.is_cuda else torch.float32)
        self.jobs = make_jobs(self.model, self.pipeline, folder)
        context.synchronize()
        context.record("model", **self._described(folder), seconds=time.monotonic() - started_at)
        raise_clocks(context)

    def run(self, more: Callable[["Speed"], None] = lambda _: None) -> None:
        """Measure in the order of what matters most; `more` is the family's own."""
        for part in (self._measure_accuracy, self._measure_steps, lambda: self._measure_sets(more)):
            part()
            self._free()

    def copied(self) -> Any:
        """Return a separate pipeline on the same parameters."""
        return shared_copy(self.pipeline)

    def _described(self, folder: Path) -> Figures:
        parts = {name: part for name, part in self.pipeline.components.items() if isinstance(part, torch.nn.Module)}
        return {
            "parameters": {name: sum(one.numel() for one in part.parameters()) for name, part in parts.items()},
            "pixels": self.model.pixels,
            "steps": self.model.steps,
            "guidance": self.model.guidance,
            "adapter_bytes": [path.stat().st_size for path in sorted(folder.iterdir())],
        }

    def _measure_accuracy(self) -> None:
        context = self.context
        accuracy = Accuracy(context, self.model, self.pipeline, self.jobs)
        context.measure("reference in fp32", accuracy.compute_references)
        context.measure("error in bf16", lambda: accuracy.compare("bf16"))
        context.measure("error in fp16", lambda: accuracy.compare("fp16"))

    def _measure_steps(self) -> None:
        context = self.context
        forwards = Forwards(self.model, self.copied(), context.device, self.jobs)
        measure_steps(context, self.model, forwards)
        context.measure("decode", lambda: self._decode(forwards))
        context.measure("memory", lambda: measure_memory(context, forwards), needs_cuda=True)
        context.measure("adapter swap", lambda: measure_swaps(context, forwards, self._adapter(SWAPPED)))
        context.measure("profile", lambda: profile_step(context, forwards))

    def _measure_sets(self, more: Callable[["Speed"], None]) -> None:
        context, model, device = self.context, self.model, self.context.device
        sets = Sets(context, self.jobs, TINY_JOBS if model.is_tiny else model.baseline_jobs)
        started_at = time.monotonic()
        with BenchEngine(model, self.copied(), device) as engine:
            context.record(
                "engine", seconds_to_start=time.monotonic() - started_at, step_seconds=engine.facts.step_seconds
            )
            context.measure("ten jobs: engine", lambda: sets.by_engine(engine, rounds=model.engine_rounds))
            baseline = Baseline(model, self.copied(), device)
            context.measure("ten jobs: diffusers, load and unload", lambda: sets.by_loading(baseline))
            swapped = self._adapter(SWAPPED)
            context.measure("adapter swap by diffusers", lambda: measure_diffusers_swaps(context, baseline, swapped))
            context.measure("ten jobs: diffusers, preloaded", lambda: sets.by_preloaded(baseline))
            more(self)
            self._measure_joins(engine)
        context.measure(
            "ten jobs: diffusers, compiled and hot-swapped",
            lambda: sets.by_compiled(CompiledBaseline(model, self.copied(), device)),
            needs_cuda=True,
            needs_seconds=COMPILE_SECONDS,
        )

    def _measure_joins(self, engine: BenchEngine) -> None:
        running = self.jobs[: NUM_JOBS - 1]
        for number in range(self.model.num_joins):
            work = partial(measure_join, engine, running, self._new_job(number))
            self.context.measure(f"arrival {number}", work, needs_seconds=10)

    def _new_job(self, number: int) -> Job:
        """Return a job with an adapter new to the engine: a copy of a file is another adapter."""
        path = self._adapter(SWAPPED)
        copied = path.with_name(f"new-{number}.safetensors")
        copied.write_bytes(path.read_bytes())
        return replace(self.jobs[SWAPPED], adapters=((copied, 1.0),), seed=900 + number)

    def _adapter(self, number: int) -> Path:
        return self.jobs[number].adapters[0][0]

    def _free(self) -> None:
        """Free the memory of the part before: modules and their hooks reference each other."""
        gc.collect()
        if self.context.is_cuda:
            torch.cuda.empty_cache()

    def _decode(self, forwards: Forwards) -> Figures:
        sampler = forwards.lanes[0].sampler
        assert sampler is not None, "a lane has its sampler from joining on"

        def decode() -> None:
            with torch.inference_mode():
                forwards.family.decode(sampler.latents)

        return time_calls(self.context, decode, repeats=5)._asdict()


def run_speed(context: Context, name: str, more: Callable[[Speed], None] = lambda _: None) -> None:
    """Measure the model called so. Its adapters are in memory where the system has a folder with room for that."""
    has_room = MEMORY_FOLDER.is_dir() and shutil.disk_usage(MEMORY_FOLDER).free > ADAPTER_ROOM_BYTES
    with tempfile.TemporaryDirectory(dir=MEMORY_FOLDER if has_room else None) as folder:
        Speed(context, name, Path(folder)).run(more)
