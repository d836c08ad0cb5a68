"""Stable Diffusion 1.x and 2.x: load once, then encode prompts, denoise batches of lanes and decode pictures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray

from inference.adapters import Adapter, check_fits
from inference.bank import AdapterBank, PackedAdapter, Row
from inference.lane import Lane
from inference.request import EngineStartFailed
from inference.sampling import Sampler, Samplers

PIPELINE_CLASS = "StableDiffusionPipeline"


class StableDiffusion:
    """Owner of the resident model and its adapter bank. The engine's one thread calls it; `pack` runs on any."""

    family = "stable-diffusion"

    def __init__(self, model_id: str, *, device: torch.device, dtype: torch.dtype) -> None:
        _check_is_stable_diffusion(model_id)
        self.device = device
        self._pipeline = _load(model_id, dtype).to(device)
        _check_is_plain(self._pipeline.unet, model_id)
        self._models = {"unet": self._pipeline.unet, "text_encoder": self._pipeline.text_encoder}
        self.bank = AdapterBank(self._models, device=device, dtype=dtype)
        self.samplers = Samplers(self._pipeline.scheduler.config)
        # Convolutions run on tensor cores without a transpose around each of them.
        self._memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self._pipeline.unet.to(memory_format=self._memory_format)
        self._pipeline.vae.to(memory_format=self._memory_format)

    @property
    def base_size(self) -> int:
        """The side, in pixels, of the square picture the checkpoint was trained for."""
        return int(self._pipeline.unet.config.sample_size * self.size_multiple)

    @property
    def size_multiple(self) -> int:
        return int(self._pipeline.vae_scale_factor)

    def pack(self, adapter: Adapter) -> PackedAdapter:
        """The adapter as the bank takes it; AdapterIncompatible unless every layer fits."""
        check_fits(adapter, self._models)
        return self.bank.pack(adapter)

    def encode(self, texts: Sequence[str], adapters: Sequence[Row]) -> torch.Tensor:
        """Embeddings [texts, tokens, width], each under its own adapters."""
        self.bank.route(adapters)
        embeddings, _ = self._pipeline.encode_prompt(list(texts), self.device, 1, False)
        return embeddings  # type: ignore[no-any-return]

    def begin(self, lane: Lane) -> tuple[str, Sampler]:
        """The lane's sampler at its first step, and its scheduler's name."""
        request = lane.drawing.request
        # Noise comes from the CPU and in 32 bits, so that a seed gives the same picture on any device.
        generator = torch.Generator().manual_seed(lane.seed)
        multiple = self.size_multiple
        shape = (self._pipeline.unet.config.in_channels, request.height // multiple, request.width // multiple)
        noise = torch.randn(shape, generator=generator).to(self.device)
        return self.samplers.begin(request.scheduler, request.num_inference_steps, noise, generator)

    def denoise(self, lanes: Sequence[Lane]) -> list[torch.Tensor]:
        """One forward for lanes of one shape: a guided prediction [channels, height, width] each, fp32.

        Rows: the negative prompts of the guided lanes, their prompts, then the prompts of the others.
        """
        guided = [lane for lane in lanes if lane.num_rows == 2]
        ordered = guided + [lane for lane in lanes if lane.num_rows == 1]
        rows = guided + ordered
        self.bank.route([lane.drawing.row for lane in rows])
        latents = torch.stack([_sampler(lane).model_input() for lane in rows])
        predictions = self._pipeline.unet(
            latents.to(self._pipeline.unet.dtype, memory_format=self._memory_format),
            self._upload([_sampler(lane).timestep for lane in rows]),
            torch.stack([_embedding(lane, is_negative=i < len(guided)) for i, lane in enumerate(rows)]),
            return_dict=False,
        )[0].float()
        negative, positive, unguided = predictions.split((len(guided), len(guided), len(lanes) - len(guided)))
        scales = self._upload([lane.drawing.request.guidance_scale for lane in guided]).view(-1, 1, 1, 1)
        drawn = torch.cat((negative + scales * (positive - negative), unguided)).unbind()
        by_lane = {id(lane): prediction for lane, prediction in zip(ordered, drawn, strict=True)}
        return [by_lane[id(lane)] for lane in lanes]

    def decode(self, latents: torch.Tensor, *, in_tiles: bool = False) -> NDArray[np.uint8] | None:
        """The picture [height, width, 3] of latents [channels, height, width], rounded as the pipeline would; None
        where it came out as no numbers. Tiles take less memory and blend where they meet."""
        vae = self._pipeline.vae
        vae.use_tiling = in_tiles
        scaled = latents[None].to(vae.dtype) / vae.config.scaling_factor
        image = vae.decode(scaled, return_dict=False)[0][0].float()
        pixels = ((image / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
        return pixels.cpu().numpy() if image.isfinite().all() else None

    def _upload(self, values: list[float]) -> torch.Tensor:
        # From pinned memory: any other copy would wait for the step that is running.
        host = torch.tensor(values, dtype=torch.float32, pin_memory=self.device.type == "cuda")
        return host.to(self.device, non_blocking=True)


def _sampler(lane: Lane) -> Sampler:
    assert lane.sampler is not None, "a lane has its sampler from joining on"  # noqa: S101
    return lane.sampler


def _embedding(lane: Lane, *, is_negative: bool) -> torch.Tensor:
    conditioning = lane.drawing.conditioning
    assert conditioning is not None, "a lane has its conditioning from joining on"  # noqa: S101
    embedding = conditioning.negative if is_negative else conditioning.positive
    assert embedding is not None, "a guided lane has a negative prompt's embedding"  # noqa: S101
    return embedding


def _check_is_plain(unet: Any, model_id: str) -> None:
    """The pipeline has more kinds of UNet than this file."""
    config = unet.config
    if config.time_cond_proj_dim is not None or config.in_channels != config.out_channels:
        kind = "an inpainting or guidance-distilled UNet"
        raise EngineStartFailed(f"MODEL_ID {model_id!r} has {kind}; this version draws pictures from text alone")


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
