"""The set drawn by plain diffusers, as its users would write it."""

import statistics
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.batching.bench import GUIDANCE, Bench, encode_all, spread
from benchmarks.sets import Job, activate


def draw_by_diffusers(bench: Bench, pipe: Any) -> list[Image.Image]:
    """Load the adapters, generate and unload, one job after another."""
    images = []
    for job in bench.jobs:
        names = [f"adapter_{i}" for i in range(len(job.adapters))]
        for name, (path, _) in zip(names, job.adapters, strict=True):
            pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
        if names:
            pipe.set_adapters(names, [scale for _, scale in job.adapters])
        images.append(_draw(bench, pipe, job))
        if names:
            pipe.unload_lora_weights()
    return encode_all(images)


def measure_preloaded(bench: Bench, engine_seconds: float) -> dict[str, Any]:
    """Time the set with all adapters preloaded, and `set_adapters` for each job."""
    pipe = bench.pipeline()
    names: dict[Path, str] = {}
    for path in dict.fromkeys(path for job in bench.jobs for path, _ in job.adapters):
        names[path] = f"adapter_{len(names)}"
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=names[path])

    def draw() -> None:
        for job in bench.jobs:
            activate(pipe, names, job)
            encode_all([_draw(bench, pipe, job)])

    draw()
    seconds = []
    for _ in range(bench.rounds):
        started_at = bench.clock()
        draw()
        seconds.append(bench.clock() - started_at)
    return {"seconds": spread(seconds), "speedup": statistics.median(seconds) / engine_seconds}


def _draw(bench: Bench, pipe: Any, job: Job) -> Image.Image:
    side = bench.pixels // pipe.vae_scale_factor
    shape = (1, pipe.unet.config.in_channels, side, side)
    # The engine's noise, passed to diffusers.
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(job.seed))
    image: Image.Image = pipe(
        job.prompt,
        negative_prompt="",
        width=bench.pixels,
        height=bench.pixels,
        num_inference_steps=bench.steps,
        guidance_scale=GUIDANCE,
        latents=noise,
    ).images[0]
    return image
