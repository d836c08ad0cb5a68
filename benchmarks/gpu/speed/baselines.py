"""What a diffusers user would write, three ways: load and unload around each job, all adapters preloaded, compiled.

Each has what the engine has: 16 bits, cuDNN's attention first on Hopper, channels-last, PNG files made in threads, and
the engine's noise as `latents`, so that images can be compared.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from PIL import Image

from benchmarks.gpu.models.bench_model import BenchModel
from benchmarks.gpu.models.engine import Encoder
from benchmarks.gpu.models.jobs import distinct_files, noise_of
from benchmarks.sets import Job, activate
from inference.device.attention import AttentionOrder

HOTSWAPPED = "hotswapped"


class Baseline:
    """A pipeline of diffusers on modules that nothing else runs."""

    def __init__(self, model: BenchModel, pipeline: Any, device: torch.device) -> None:
        self.pipeline = pipeline
        self._model = model
        self._device = device
        self._attention = AttentionOrder(device)
        self._names: dict[Path, str] = {}
        _, pipeline.scheduler = model.family.schedulers.make(None, pipeline.scheduler.config)
        if device.type == "cuda":
            pipeline.vae.to(memory_format=torch.channels_last)
            if model.denoiser == "unet":
                pipeline.unet.to(memory_format=torch.channels_last)

    def draw(self, job: Job, *, steps: int | None = None) -> Image.Image:
        """Generate the job's image with the active adapters."""
        noise = noise_of(job, self._model, self.pipeline).to(self._device)
        with self._attention.applied():
            image: Image.Image = self.pipeline(
                job.prompt,
                width=self._model.pixels,
                height=self._model.pixels,
                num_inference_steps=steps or self._model.steps,
                guidance_scale=self._model.guidance,
                latents=noise,
            ).images[0]
        return image

    def draw_by_loading(self, jobs: Sequence[Job], encoder: Encoder) -> list[Image.Image]:
        """Load a job's adapters, draw, unload: one job after another."""
        images = []
        for job in jobs:
            names = [f"adapter_{number}" for number in range(len(job.adapters))]
            for name, (path, _) in zip(names, job.adapters, strict=True):
                self.pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
            if names:
                self.pipeline.set_adapters(names, [scale for _, scale in job.adapters])
            images.append(self.draw(job))
            encoder.submit(images[-1])
            if names:
                self.pipeline.unload_lora_weights()
        encoder.wait()
        return images

    def preload(self, jobs: Sequence[Job]) -> None:
        """Load every adapter for good."""
        for path in distinct_files(jobs):
            self._names[path] = f"adapter_{len(self._names)}"
            self.pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=self._names[path])

    def draw_preloaded(self, jobs: Sequence[Job], encoder: Encoder) -> list[Image.Image]:
        """Choose among the preloaded adapters, draw: one job after another."""
        images = []
        for job in jobs:
            activate(self.pipeline, self._names, job)
            images.append(self.draw(job))
            encoder.submit(images[-1])
        encoder.wait()
        return images


class CompiledBaseline(Baseline):
    """One pipeline with its repeated blocks compiled and one adapter, which every job's takes the place of.

    Hot-swapping keeps the compiled code: ranks are filled up to the largest, and the first adapter must have every
    layer that a later one has. Text encoders' layers cannot be swapped and are left out, and so is a job's second
    adapter; a job without any draws with the one before it. All that makes this baseline faster than a whole one.
    """

    def compile(self, jobs: Sequence[Job], *, backend: str = "inductor") -> None:
        """Load the first adapter and have the blocks compiled, which the first image does."""
        denoiser = getattr(self.pipeline, self._model.denoiser)
        self.pipeline.enable_lora_hotswap(target_rank=max(map(_rank_of, distinct_files(jobs))))
        widest = max(distinct_files(jobs), key=lambda path: len(self._layers_of(path)))
        self.pipeline.load_lora_weights(self._layers_of(widest), adapter_name=HOTSWAPPED)
        denoiser.compile_repeated_blocks(backend=backend)

    def draw_hotswapped(self, jobs: Sequence[Job], encoder: Encoder) -> list[Image.Image]:
        """Draw the jobs sorted by adapter: swap, draw, one after another."""
        images = []
        active: Path | None = None
        for job in sorted(jobs, key=lambda one: str(one.adapters)):
            wanted = job.adapters[0][0] if job.adapters else active
            if wanted is not None and wanted != active:
                self.pipeline.load_lora_weights(self._layers_of(wanted), adapter_name=HOTSWAPPED, hotswap=True)
                active = wanted
            images.append(self.draw(job))
            encoder.submit(images[-1])
        encoder.wait()
        return images

    def _layers_of(self, path: Path) -> dict[str, torch.Tensor]:
        """Return the file's weights for the denoiser."""
        state = safetensors.torch.load_file(path)
        return {name: weight for name, weight in state.items() if name.startswith(f"{self._model.denoiser}.")}


def _rank_of(path: Path) -> int:
    state = safetensors.torch.load_file(path)
    return max(weight.shape[0] for name, weight in state.items() if name.endswith("lora_A.weight"))
