"""The engine under test, and what a worker does around it: PNG files made in threads while others are drawn."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from io import BytesIO
from typing import Any, Self

import torch
from PIL import Image

from benchmarks.gpu.models.bench_model import BenchModel
from benchmarks.gpu.models.jobs import NUM_JOBS, request_of
from benchmarks.sets import Job, image_of
from config.model import ModelSettings
from inference.engine.local_engine import LocalEngine
from inference.models.base import Family
from inference.request import EngineLoad, GenerationResult, StepReport

NUM_ENCODERS = 4


class BenchEngine(LocalEngine):
    """`LocalEngine` over a pipeline that is there already, in place of a checkpoint's files."""

    def __init__(self, model: BenchModel, pipeline: Any, device: torch.device) -> None:
        self._bench_model = model
        self.family = model.family_of(pipeline, device)
        self.num_batched: list[int] = []
        denoiser = getattr(pipeline, model.denoiser)
        settings = {
            "MODEL_ID": model.name,
            "DEVICE": device.type,
            "DTYPE": str(denoiser.dtype).removeprefix("torch."),
            "MAX_CONCURRENT_GENERATIONS": NUM_JOBS,
        }
        super().__init__(ModelSettings.model_validate(settings), self._note)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(
        self, job: Job, on_step: Callable[[StepReport], None] = lambda _: None, *, steps: int | None = None
    ) -> "Future[GenerationResult]":
        """Submit a job to the engine."""
        return self.generate(request_of(job, self._bench_model, steps=steps), on_step, lambda: False)

    def draw_all(self, jobs: Sequence[Job], encoder: "Encoder") -> list[Image.Image]:
        """Generate all jobs at once; encode each image as it comes."""
        futures = [self.submit(job) for job in jobs]
        images = {}
        for future in as_completed(futures):
            images[future] = image_of(future.result())
            encoder.submit(images[future])
        encoder.wait()
        return [images[future] for future in futures]

    def _load(self, settings: ModelSettings, device: torch.device, dtype: torch.dtype) -> Family:
        return self.family

    def _note(self, engine_load: EngineLoad) -> None:
        self.num_batched.append(engine_load.num_batched)


class Encoder:
    """Makes PNG files in threads while others are drawn, as the worker's supervisor does."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(NUM_ENCODERS)
        self._pending: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def submit(self, image: Image.Image) -> None:
        """Begin to encode."""
        self._pending.append(self._pool.submit(image.save, BytesIO(), "PNG"))

    def wait(self) -> None:
        """Wait until everything so far is encoded."""
        for one in self._pending:
            one.result()
        self._pending.clear()


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of `work` and the seconds it took."""
    started_at = time.perf_counter()
    returned = work()
    return returned, time.perf_counter() - started_at
