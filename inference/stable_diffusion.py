"""Stable Diffusion 1.x and 2.x: load the checkpoint once, then encode, denoise and decode request by request."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray

from inference.adapters import check_fits, read_adapter
from inference.request import (
    EngineStartFailed,
    GenerationRequest,
    IsCancelled,
    OnStep,
    RequestCancelled,
    RequestFailed,
    StepReport,
)
from inference.schedulers import make_scheduler

PIPELINE_CLASS = "StableDiffusionPipeline"

Embeddings = tuple[torch.Tensor, torch.Tensor | None]


class StableDiffusion:
    """Owner of the resident pipeline. Not thread-safe: the engine's one thread calls it."""

    family = "stable-diffusion"

    def __init__(self, model_id: str, *, device: torch.device, dtype: torch.dtype) -> None:
        _check_is_stable_diffusion(model_id)
        self.device = device
        self._pipeline = _load(model_id, dtype).to(device)
        self._pipeline.set_progress_bar_config(disable=True)
        self._scheduler_config = self._pipeline.scheduler.config
        if device.type == "cuda":
            # Convolutions run on tensor cores without a transpose around each of them.
            self._pipeline.unet.to(memory_format=torch.channels_last)
            self._pipeline.vae.to(memory_format=torch.channels_last)

    @property
    def base_size(self) -> int:
        """The side, in pixels, of the square picture the checkpoint was trained for."""
        return int(self._pipeline.unet.config.sample_size * self.size_multiple)

    @property
    def size_multiple(self) -> int:
        return int(self._pipeline.vae_scale_factor)

    @contextmanager
    def adapters(self, request: GenerationRequest) -> Iterator[None]:
        """Have the request's adapters, and no others, active inside the block."""
        adapters = [read_adapter(file.weights, file.config) for file in request.adapters]
        for adapter in adapters:
            # All before the first is loaded: loading wraps the very layers that are looked at.
            check_fits(adapter, {"unet": self._pipeline.unet, "text_encoder": self._pipeline.text_encoder})
        if not adapters:
            yield
            return

        names = [f"adapter_{index}" for index in range(len(adapters))]
        try:
            for name, adapter in zip(names, adapters, strict=True):
                self._pipeline.load_lora_weights(adapter.state_dict(), adapter_name=name)
            self._pipeline.set_adapters(names, [file.scale for file in request.adapters])
            yield
        finally:
            self._pipeline.unload_lora_weights()

    def encode(self, request: GenerationRequest) -> Embeddings:
        """The prompt's embeddings, `[lanes, tokens, width]`, and the negative prompt's where guidance is on."""
        positive, negative = self._pipeline.encode_prompt(
            request.prompt,
            self.device,
            num_images_per_prompt=len(request.seeds),
            do_classifier_free_guidance=request.guidance_scale > 1,
            negative_prompt=request.negative_prompt,
        )
        return positive, negative

    def denoise(
        self, request: GenerationRequest, embeddings: Embeddings, on_step: OnStep, is_cancelled: IsCancelled
    ) -> tuple[torch.Tensor, str]:
        """Latents `[lanes, channels, height / multiple, width / multiple]`, and the scheduler's name."""
        name, self._pipeline.scheduler = make_scheduler(request.scheduler, self._scheduler_config)
        # Noise comes from the CPU, so that a seed gives the same picture on any device.
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in request.seeds]
        on_step(StepReport(0, request.num_inference_steps, len(request.seeds), 0.0))
        latents = self._pipeline(
            prompt_embeds=embeddings[0],
            negative_prompt_embeds=embeddings[1],
            width=request.width,
            height=request.height,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            generator=generators,
            output_type="latent",
            callback_on_step_end=_reporter(request, on_step, is_cancelled),
        ).images
        return latents, name

    def decode(self, latents: torch.Tensor) -> NDArray[np.uint8]:
        """Pictures `[lanes, height, width, 3]` of latents, as the pipeline itself would round them."""
        scaled = latents / self._pipeline.vae.config.scaling_factor
        images = self._pipeline.vae.decode(scaled, return_dict=False)[0]
        if not torch.isfinite(images).all():
            raise RequestFailed("OUTPUT_INVALID", "the model drew a picture with values that are not numbers")
        unit = self._pipeline.image_processor.postprocess(images, output_type="np")
        return (unit * 255).round().astype(np.uint8)  # type: ignore[no-any-return]


def _reporter(request: GenerationRequest, on_step: OnStep, is_cancelled: IsCancelled) -> Any:
    last = time.perf_counter()

    def after_step(_pipeline: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal last
        now = time.perf_counter()
        on_step(StepReport(index + 1, request.num_inference_steps, len(request.seeds), now - last))
        last = now
        if is_cancelled():
            raise RequestCancelled("cancelled by the caller")
        return tensors

    return after_step


def _load(model_id: str, dtype: torch.dtype) -> Any:
    try:
        return diffusers.StableDiffusionPipeline.from_pretrained(
            model_id,
            # Never left to the files: transformers would keep their dtype for the text encoder, diffusers take fp32.
            dtype=dtype,
            use_safetensors=True,
            safety_checker=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise EngineStartFailed(f"MODEL_ID {model_id!r} could not be loaded: {error}") from error


def _check_is_stable_diffusion(model_id: str) -> None:
    """Refuse a folder of another family before gigabytes of it are read; a hub id shows itself on loading."""
    if not Path(model_id).is_dir():
        return
    index = Path(model_id) / "model_index.json"
    if not index.is_file():
        raise EngineStartFailed(f"MODEL_ID {model_id!r} is a folder without model_index.json: name a diffusers folder")
    try:
        found = json.loads(index.read_text()).get("_class_name")
    except ValueError as error:
        raise EngineStartFailed(f"{index} is not JSON: {error}") from error
    if found != PIPELINE_CLASS:
        raise EngineStartFailed(f"MODEL_ID {model_id!r} holds a {found}; this version runs {PIPELINE_CLASS}")
