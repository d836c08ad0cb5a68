"""The ten jobs of a set, with their adapters: `benchmarks.models.ADAPTERS`, one job without any and one with two."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from benchmarks.gpu.models.bench_model import BenchModel
from benchmarks.models import ADAPTERS, TEXT_LAYERS, AdapterKind
from benchmarks.sets import Job
from inference.request import GenerationRequest

NUM_JOBS = 10
# Half of the change that its base weights make: any adapter left out or mixed up shows.
UP_DEVIATION = 0.5
# Tokens of a Z-Image caption, the chat template's included: from the shortest job's to the longest's.
CAPTION_TOKENS = (32, 160)
FIRST_SEED = 100


def request_of(job: Job, model: BenchModel, *, steps: int | None = None) -> GenerationRequest:
    """Build the engine's request for the job, at the model's size and guidance."""
    return job.request(pixels=model.pixels, steps=steps or model.steps, guidance=model.guidance)


def noise_of(job: Job, model: BenchModel, pipeline: Any) -> torch.Tensor:
    """Generate the noise that the engine begins with, for diffusers' `latents`: sampled in fp32 on the CPU.

    In 16 bits a seed's noise is another before torch 2.12, and so is the image.
    """
    denoiser = getattr(pipeline, model.denoiser)
    side = model.pixels // 8
    generator = torch.Generator().manual_seed(job.seed)
    drawn = torch.randn(denoiser.config.in_channels, side, side, generator=generator)[None]
    # Z-Image's pipeline keeps its latents in 32 bits.
    return drawn if model.denoiser == "transformer" else drawn.to(denoiser.dtype)


def make_jobs(model: BenchModel, pipeline: Any, folder: Path) -> list[Job]:
    """Write the adapters into `folder`, and return the jobs that use them."""
    folder.mkdir(parents=True, exist_ok=True)
    largest = max(kind.rank for kind in ADAPTERS)
    files = []
    for number, kind in enumerate(ADAPTERS):
        rank = model.largest_rank if kind.rank == largest else kind.rank
        path = folder / f"{number}.safetensors"
        files.append(write_adapter(path, model, pipeline, kind._replace(rank=rank), seed=number))
    adapters: list[tuple[tuple[Path, float], ...]] = [((file, 1.0),) for file in files]
    adapters += [(), ((files[0], 0.5), (files[2], 0.8))]
    prompts = _prompts(model, pipeline)
    return [Job(prompts[i], FIRST_SEED + i, adapters[i]) for i in range(NUM_JOBS)]


def write_adapter(path: Path, model: BenchModel, pipeline: Any, kind: AdapterKind, *, seed: int) -> Path:
    """Write a random adapter in diffusers' format, sampled on the pipeline's device."""
    targets = model.linear if kind.is_all_linear else model.attention
    wanted = [(model.denoiser, targets)]
    wanted += [(name, TEXT_LAYERS) for name in model.text_encoders if kind.has_text]
    state: dict[str, torch.Tensor] = {}
    for root, endings in wanted:
        module = getattr(pipeline, root)
        generator = torch.Generator(module.device).manual_seed(seed)
        for name, layer in module.named_modules():
            if isinstance(layer, torch.nn.Linear) and name.endswith(endings):
                down, up = _low_rank(layer, kind.rank, generator)
                state[f"{root}.{name}.lora_A.weight"] = down
                state[f"{root}.{name}.lora_B.weight"] = up
    safetensors.torch.save_file(state, path)
    return path


def distinct_files(jobs: Sequence[Job]) -> list[Path]:
    """Return the adapters of the jobs, each once."""
    return list(dict.fromkeys(path for job in jobs for path, _ in job.adapters))


def _low_rank(layer: torch.nn.Linear, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    down, up = (layer.weight.new_empty(shape) for shape in ((rank, layer.in_features), (layer.out_features, rank)))
    down.normal_(0, layer.in_features**-0.5, generator=generator)
    up.normal_(0, UP_DEVIATION * rank**-0.5, generator=generator)
    return down.cpu(), up.cpu()


def _prompts(model: BenchModel, pipeline: Any) -> list[str]:
    """List short prompts for CLIP, which pads them all to 77 tokens; captions of many lengths for Z-Image."""
    if model.denoiser != "transformer":
        return [f"a picture of thing {number}" for number in range(NUM_JOBS)]
    shortest, longest = CAPTION_TOKENS
    chat = [{"role": "user", "content": ""}]
    template = pipeline.tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    own = len(pipeline.tokenizer(template).input_ids)
    lengths = [shortest + (longest - shortest) * number // (NUM_JOBS - 1) - own for number in range(NUM_JOBS)]
    # A token a byte.
    return [(f"thing {number} " * longest)[: max(1, length)] for number, length in enumerate(lengths)]
