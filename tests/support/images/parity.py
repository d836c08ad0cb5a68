"""Pictures for tests: the engine's, plain diffusers' own, and how much they differ."""

import copy
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image

from config.model import ModelSettings
from inference.engine.local_engine import LocalEngine
from inference.request import AdapterFile, GenerationRequest, GenerationResult, StepReport
from inference.sampling.schedulers import DIFFUSION
from tests.support.models.tiny_models import load_pipe
from tests.support.paths import DEMO_MODEL

# What the engines of the tests draw on. The pictures that theirs are held against are drawn on the CPU.
TEST_DEVICE = os.environ.get("DARKROOM_TEST_DEVICE", "cpu")
# Whether the engines' blocks are compiled, in tests that do not say so themselves: `blocks` takes minutes.
TEST_COMPILE = os.environ.get("DARKROOM_TEST_COMPILE", "off")
# What the design promises of a picture against plain diffusers', fp32 on a CPU.
MIN_PSNR_DB = 42.0
# Two pictures further apart than this are two pictures.
DIFFERENT_DB = 35.0


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Compute on one thread: two run slower where the machine is busy, and add up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def whole_fp32() -> Iterator[None]:
    """Turn TF32 off: with it, a GPU rounds the factors of fp32 products to 19 bits."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, is_allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = is_allowed


def settings_of(checkpoint: Path, **variables: Any) -> ModelSettings:
    """Build an engine's settings for a checkpoint on the tests' device, in fp32 unless `DTYPE` says otherwise."""
    usual = {"MODEL_ID": str(checkpoint), "DEVICE": TEST_DEVICE, "DTYPE": "float32", "COMPILE": TEST_COMPILE}
    return ModelSettings.model_validate(usual | variables)


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Compute the peak signal-to-noise ratio in dB; infinite for equal images."""
    error = np.square(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def images_of(result: GenerationResult) -> list[Image.Image]:
    return [Image.frombytes("RGB", (one.width, one.height), one.rgb) for one in result.images]


def draw(engine: LocalEngine, request: GenerationRequest, steps: list[StepReport] | None = None) -> list[Image.Image]:
    """Generate the request's images on the engine, and wait for them."""
    on_step = (steps if steps is not None else []).append
    return images_of(engine.generate(request, on_step, lambda: False).result())


def plain(pipe: Any, request: GenerationRequest, *, seed: int | None = None) -> Image.Image:
    """Generate with a loaded plain pipeline, in fp32, for one of the request's seeds (None: the first); see
    `tests.support.models.plain_families.noise_of` for other dtypes.
    """
    _, pipe.scheduler = DIFFUSION.make(request.scheduler, pipe.scheduler.config)
    drawn = pipe(
        request.prompt,
        negative_prompt=request.negative_prompt,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(request.seeds[0] if seed is None else seed),
    )
    return drawn.images[0]  # type: ignore[no-any-return]


def solo(checkpoint: Path, request: GenerationRequest, *, seed: int | None = None) -> Image.Image:
    """Generate with a plain pipeline that has the request's own adapters alone."""
    return plain(pipe_with(checkpoint, *request.adapters), request, seed=seed)


def pipe_with(checkpoint: Path, *files: AdapterFile, dtype: torch.dtype = torch.float32) -> Any:
    """Return a plain pipeline with these adapters, as the libraries' users load it. A PEFT folder comes alone.

    Loaded once for the same checkpoint and the same bytes: all that requests change in it is set anew.
    """
    pipe, scheduler = _loaded(checkpoint, tuple(_Adapter(file, _digest_of(file)) for file in files), dtype)
    pipe.scheduler = copy.deepcopy(scheduler)
    if any(file.config for file in files):
        assert [file.scale for file in files] == [1.0]
    elif files:
        pipe.set_adapters(_names(files), [file.scale for file in files])
    return pipe


@dataclass(frozen=True)
class _Adapter:
    """An adapter that is the same wherever its bytes lie."""

    file: AdapterFile = field(compare=False)
    digest: str


def _digest_of(file: AdapterFile) -> str:
    content = file.weights.read_bytes() + (file.config.read_bytes() if file.config else b"")
    return hashlib.sha256(content).hexdigest()


@lru_cache(maxsize=32)
def _loaded(checkpoint: Path, adapters: tuple[_Adapter, ...], dtype: torch.dtype) -> Any:
    """Load a pipeline with these adapters, and return it with its own scheduler."""
    pipe: Any = copy.deepcopy(_bare(checkpoint, dtype))
    files = [adapter.file for adapter in adapters]
    for name, file in zip(_names(files), files, strict=True):
        if file.config:
            denoiser = "unet" if hasattr(pipe, "unet") else "transformer"
            adapted = PeftModel.from_pretrained(getattr(pipe, denoiser), file.weights.parent)
            setattr(pipe, denoiser, adapted.get_base_model())
        else:
            pipe.load_lora_weights(file.weights.parent, weight_name=file.weights.name, adapter_name=name)
    return pipe, pipe.scheduler


@lru_cache(maxsize=8)
def _bare(checkpoint: Path, dtype: torch.dtype) -> Any:
    """Load a pipeline to copy, which is quicker than to load another."""
    return load_pipe(checkpoint, dtype)


def _names(files: Sequence[AdapterFile]) -> list[str]:
    return [f"adapter{number}" for number in range(len(files))]


def demo_adapter(name: str, scale: float = 1.0) -> AdapterFile:
    return AdapterFile(DEMO_MODEL / "adapters" / f"{name}.safetensors", None, scale)
