"""One model with its jobs, the engine under test, and what the cases measure with."""

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

from benchmarks.models import ADAPTERS, ALL_LINEAR, ATTENTION, DEMO_MODEL, SIZES, AdapterKind, build, write_adapter
from benchmarks.sets import Job, image_of
from config.model import ModelSettings
from inference.engine.local_engine import LocalEngine
from inference.request import EngineLoad, GenerationRequest, GenerationResult

NUM_JOBS = 10
GUIDANCE = 5.0
# On layers of real width the largest is larger.
LARGEST_RANK = {"sd15": 128}
DEVICE = torch.device("cpu")
DTYPE = torch.float32


@dataclass(slots=True)
class Bench:
    """One model, and the jobs to run with it."""

    name: str
    folder: Path
    pixels: int
    steps: int
    rounds: int
    jobs: list[Job]

    def clock(self) -> float:
        return time.process_time()

    def settings(self) -> ModelSettings:
        return ModelSettings(
            MODEL_ID=str(self.folder),
            DEVICE=DEVICE.type,
            MAX_CONCURRENT_GENERATIONS=NUM_JOBS,
        )

    def request(self, job: Job, *, steps: int | None = None) -> GenerationRequest:
        return job.request(pixels=self.pixels, steps=steps or self.steps, guidance=GUIDANCE)

    def pipeline(self) -> Any:
        pipe = StableDiffusionPipeline.from_pretrained(self.folder, dtype=DTYPE, safety_checker=None)
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, algorithm_type="dpmsolver++")
        pipe.set_progress_bar_config(disable=True)
        return pipe


def make_bench(name: str, folder: Path, *, steps: int, rounds: int) -> Bench:
    """Build a random model in `folder`, or take the demo's, with ten jobs: eight adapters, none, and two at once."""
    folder.mkdir()
    checkpoint = DEMO_MODEL / "checkpoint" if name == "demo" else build(name, folder / "checkpoint", DTYPE)
    pixels = 128 if name == "demo" else SIZES[name].pixels
    bench = Bench(name, checkpoint, pixels, steps, rounds, [])
    pipe = bench.pipeline()
    files = [folder / f"{number}.safetensors" for number in range(len(ADAPTERS))]
    for number, (file, kind) in enumerate(zip(files, _adapter_kinds(name), strict=True)):
        targets = ALL_LINEAR if kind.is_all_linear else ATTENTION
        write_adapter(file, pipe, rank=kind.rank, targets=targets, seed=number, has_text=kind.has_text)
    adapter_sets: list[tuple[tuple[Path, float], ...]] = [((file, 1.0),) for file in files]
    adapter_sets += [(), ((files[0], 0.5), (files[2], 0.8))]
    bench.jobs = [Job(f"a picture of thing {i}", 100 + i, adapters) for i, adapters in enumerate(adapter_sets)]
    return bench


def _adapter_kinds(name: str) -> list[AdapterKind]:
    largest = max(kind.rank for kind in ADAPTERS)
    return [kind._replace(rank=LARGEST_RANK.get(name, largest)) if kind.rank == largest else kind for kind in ADAPTERS]


class Engine:
    """The engine under test, recording the number of lanes of each forward."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.num_batched: list[int] = []
        self.local = LocalEngine(bench.settings(), self._note)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.local.close()

    def _note(self, engine_load: EngineLoad) -> None:
        self.num_batched.append(engine_load.num_batched)

    def submit(
        self, job: Job, on_step: Callable[[Any], None] = lambda _: None, *, steps: int | None = None
    ) -> Future[GenerationResult]:
        return self.local.generate(self._bench.request(job, steps=steps), on_step, lambda: False)

    def draw_all(self, jobs: Sequence[Job]) -> list[Image.Image]:
        return [image_of(future.result()) for future in [self.submit(job) for job in jobs]]


def seconds_each(bench: Bench, work: Callable[[], object], *, repeats: int = 5) -> float:
    """Return the mean seconds of `repeats` calls, after a warm-up."""
    work()
    started_at = bench.clock()
    for _ in range(repeats):
        work()
    return (bench.clock() - started_at) / repeats


def encode_all(images: list[Image.Image]) -> list[Image.Image]:
    """Encode all images as PNG, which both sides must do; return them."""
    for image in images:
        image.save(BytesIO(), format="PNG")
    return images


def spread(values: list[float]) -> dict[str, float]:
    """Return median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
