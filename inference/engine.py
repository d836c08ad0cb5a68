"""The engine of this process: one thread that owns the model and draws one request at a time."""

import gc
import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
import transformers

from config.settings import ModelSettings
from inference.adapters import AdapterError
from inference.request import (
    EngineStartFailed,
    GenerationRequest,
    GenerationResult,
    IsCancelled,
    ModelFacts,
    OnStep,
    Picture,
    RequestFailed,
    Stage,
    StepReport,
)
from inference.schedulers import SCHEDULERS
from inference.stable_diffusion import StableDiffusion

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 3

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class LocalEngine:
    """`Engine` in this process. Owner of the model and of the one thread that may touch it."""

    def __init__(self, settings: ModelSettings) -> None:
        """Load the model and warm it up; `EngineStartFailed` says why that cannot be."""
        _quieten_libraries()
        started_at = time.monotonic()
        device = _choose_device(settings.device)
        dtype = _choose_dtype(settings.dtype, device)
        self._model = StableDiffusion(settings.model_id, device=device, dtype=dtype)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        step_seconds = self._warm_up()
        self.facts = ModelFacts(
            model=_public_name(settings.model_id),
            family=self._model.family,
            base_size=self._model.base_size,
            size_multiple=self._model.size_multiple,
            schedulers=tuple(SCHEDULERS),
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            load_seconds=time.monotonic() - started_at,
            step_seconds=step_seconds,
        )

    def generate(
        self, request: GenerationRequest, on_step: OnStep, is_cancelled: IsCancelled
    ) -> Future[GenerationResult]:
        """Queue `request`; see `Engine`."""
        return self._thread.submit(self._draw, request, on_step, is_cancelled)

    def close(self) -> None:
        """Drop what waits, finish what is being drawn, and end the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _draw(self, request: GenerationRequest, on_step: OnStep, is_cancelled: IsCancelled) -> GenerationResult:
        try:
            return self._draw_pictures(request, on_step, is_cancelled)
        except AdapterError as error:
            raise RequestFailed(error.code, str(error)) from error
        except torch.OutOfMemoryError as error:
            logger.warning("out of memory: %s", error)

        # Only here, outside the except block, is the traceback gone and with it the tensors it held.
        gc.collect()
        torch.cuda.empty_cache()
        size = f"{len(request.seeds)} picture(s) of {request.width}x{request.height}"
        raise RequestFailed("GPU_OOM", f"{size} do not fit the GPU's memory: ask for smaller or fewer pictures")

    @torch.inference_mode()
    def _draw_pictures(
        self, request: GenerationRequest, on_step: OnStep, is_cancelled: IsCancelled
    ) -> GenerationResult:
        stages: list[Stage] = []
        with _timed("adapt", stages), self._model.adapters(request):
            with _timed("encode", stages):
                embeddings = self._model.encode(request)
            with _timed("denoise", stages):
                latents, scheduler = self._model.denoise(request, embeddings, on_step, is_cancelled)
        with _timed("decode", stages):
            pixels = self._model.decode(latents)

        pictures = tuple(
            Picture(width=image.shape[1], height=image.shape[0], rgb=image.tobytes(), seed=seed)
            for image, seed in zip(pixels, request.seeds, strict=True)
        )
        return GenerationResult(pictures=pictures, scheduler=scheduler, stages=_without_overlap(stages))

    def _warm_up(self) -> float:
        """Draw a picture nobody sees: the first forwards are slow, and the rest give the first time estimate."""
        size = self._model.base_size
        seconds: list[float] = []
        request = GenerationRequest(
            request_id="warm-up",
            prompt="",
            negative_prompt="",
            width=size,
            height=size,
            num_inference_steps=WARM_UP_STEPS,
            guidance_scale=7.5,
            seeds=(0,),
        )

        def on_step(report: StepReport) -> None:
            seconds.append(report.seconds)

        self._thread.submit(self._draw, request, on_step, lambda: False).result()
        return min(seconds[1:])


@contextmanager
def _timed(name: str, stages: list[Stage]) -> Iterator[None]:
    started_at = time.monotonic()
    yield
    stages.append(Stage(name, started_at, time.monotonic() - started_at))


def _without_overlap(stages: list[Stage]) -> tuple[Stage, ...]:
    """`adapt` spans loading, encoding, denoising and unloading: keep of it what lies before the encoding."""
    by_name = {stage.name: stage for stage in stages}
    adapt, encode = by_name["adapt"], by_name["encode"]
    by_name["adapt"] = Stage("adapt", adapt.started_at, encode.started_at - adapt.started_at)
    return tuple(sorted(by_name.values(), key=lambda stage: stage.started_at))


def _public_name(model_id: str) -> str:
    """A hub id as it is, a folder by its last part: the operator's paths are nobody else's business."""
    return Path(model_id).resolve().name if Path(model_id).is_dir() else model_id


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise EngineStartFailed(f"DEVICE is {name!r} but torch sees no GPU: check the driver and CUDA_VISIBLE_DEVICES")
    return torch.device(name)


def _choose_dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _quieten_libraries() -> None:
    """Loading bars and advice on standard error would break the one-line-of-JSON rule of the logs."""
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
