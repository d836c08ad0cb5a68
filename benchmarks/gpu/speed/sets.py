"""The ten jobs as a set: by the engine, and by diffusers in the ways of `benchmarks.gpu.speed.baselines`."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from benchmarks.gpu.models.engine import BenchEngine, Encoder, timed
from benchmarks.gpu.models.jobs import NUM_JOBS
from benchmarks.gpu.speed.baselines import Baseline, CompiledBaseline
from benchmarks.gpu.stage import Context, Figures
from benchmarks.sets import Job, psnr_db

# One with an adapter and the one without.
TINY_JOBS = (3, 8)

Draw = Callable[[Sequence[Job], Encoder], list[Image.Image]]


class Sets:
    """Owner of the images of the first set, which the baselines' are compared with."""

    def __init__(self, context: Context, jobs: Sequence[Job], chosen: Sequence[int]) -> None:
        """`chosen` jobs are what the baselines draw, whose time is counted up to that of all."""
        self._context = context
        self._jobs = jobs
        self._chosen = chosen
        self._images: list[Image.Image] = []
        self._seconds = math.nan

    def by_engine(self, engine: BenchEngine, *, rounds: int) -> Figures:
        """Time the whole set at once; the first round counts where there are no more `rounds`."""
        with Encoder() as encoder:
            self._images, first = timed(lambda: engine.draw_all(self._jobs, encoder))
            seconds = [timed(lambda: engine.draw_all(self._jobs, encoder))[1] for _ in range(rounds)] or [first]
        self._seconds = statistics.median(seconds)
        batched = [count for count in engine.num_batched if count]
        return {
            "seconds": self._seconds,
            "rounds": seconds,
            "first_seconds": first,
            "mean_batch": statistics.mean(batched),
            "jobs": NUM_JOBS,
        }

    def by_loading(self, baseline: Baseline) -> Figures:
        """Load, draw, unload."""
        return self._compared(baseline.draw_by_loading, are_comparable=True)

    def by_preloaded(self, baseline: Baseline) -> Figures:
        """Time the set with all adapters loaded before; loading is reported apart."""
        _, loading = timed(lambda: baseline.preload([self._jobs[number] for number in self._chosen]))
        return {**self._compared(baseline.draw_preloaded, are_comparable=True), "preload_seconds": loading}

    def by_compiled(self, baseline: CompiledBaseline, *, backend: str = "inductor") -> Figures:
        """Time hot-swapped adapters in compiled blocks; compiling is reported apart."""

        def compile_and_draw() -> None:
            baseline.compile(self._jobs, backend=backend)
            baseline.draw(self._jobs[0], steps=2)
            self._context.synchronize()

        _, compiling = timed(compile_and_draw)
        figures = self._compared(baseline.draw_hotswapped, are_comparable=False)
        return {**figures, "compile_seconds": compiling}

    def _compared(self, draw: Draw, *, are_comparable: bool) -> Figures:
        jobs = [self._jobs[number] for number in self._chosen]
        with Encoder() as encoder:
            images, seconds = timed(lambda: draw(jobs, encoder))
        in_full = seconds * NUM_JOBS / len(jobs)
        figures: dict[str, Any] = {
            "seconds": in_full,
            "jobs_drawn": len(jobs),
            "seconds_drawn": seconds,
            "engine_is_faster_by": in_full / self._seconds,
        }
        if are_comparable and self._images:
            pairs = zip(images, (self._images[number] for number in self._chosen), strict=True)
            figures["psnr_db"] = [psnr_db(*pair) for pair in pairs]
        return figures
