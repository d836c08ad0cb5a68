"""A set of jobs with adapters, and its images: what both sides of a comparison are given, and how alike they are."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from inference.request import AdapterFile, GenerationRequest, GenerationResult

EQUAL_DB = 99.0


@dataclass(frozen=True, slots=True)
class Job:
    """One image of a set; `adapters` are files with their scales."""

    prompt: str
    seed: int
    adapters: tuple[tuple[Path, float], ...]

    def request(self, *, pixels: int, steps: int, guidance: float) -> GenerationRequest:
        """Return the engine request for a square image."""
        return GenerationRequest(
            request_id=str(self.seed),
            prompt=self.prompt,
            negative_prompt="",
            width=pixels,
            height=pixels,
            num_inference_steps=steps,
            guidance_scale=guidance,
            seeds=(self.seed,),
            adapters=tuple(AdapterFile(path, None, scale) for path, scale in self.adapters),
            arrived_at=time.monotonic(),
        )


def activate(target: Any, names: Mapping[Path, str], job: Job) -> None:
    """Activate only the job's adapters in a diffusers pipeline or model that has loaded all of `names`."""
    if not job.adapters:
        target.disable_lora()
        return
    target.enable_lora()
    target.set_adapters([names[path] for path, _ in job.adapters], [scale for _, scale in job.adapters])


def image_of(result: GenerationResult) -> Image.Image:
    """Return a job's single image."""
    drawn = result.images[0]
    return Image.frombytes("RGB", (drawn.width, drawn.height), drawn.rgb)


def psnr_db(one: Image.Image, other: Image.Image) -> float:
    """Return the peak signal-to-noise ratio; `EQUAL_DB` for equal images."""
    error = float(np.square(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).mean())
    return EQUAL_DB if error == 0 else 10 * math.log10(255**2 / error)
