"""The rivals of `benchmarks.gpu` over fake CUDA tensors: diffusers' pipeline with PEFT's adapters, a job at a time.

A: load a job's adapters, draw, unload. P: all of them are loaded before. B: compiled, one adapter of the largest rank
on all linear layers, which every job's takes the place of.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

from benchmarks.gpu.models.bench_model import BenchModel, model_of
from benchmarks.models import ADAPTERS
from tests.support.cuda import roofline
from tests.support.cuda.fake_cuda import DEVICE, FakeCuda
from tests.support.cuda.roofline import Launch, Part, Work
from tests.support.models.full_models import bring
from tests.support.models.full_pipelines import build_pipeline

# A call of two steps and one of a step more: their difference is a step.
NUM_STEPS = 2
HOTSWAPPED = "hotswapped"


class Kind(NamedTuple):
    """Rank of an adapter and the layers that it changes, by their suffixes."""

    rank: int
    endings: tuple[str, ...]


class JobCost(NamedTuple):
    """One step of a job, and what is before the first and behind the last: encoding and decoding."""

    step: Part
    rest: Part


def jobs_of(model: BenchModel) -> list[list[Kind]]:
    """List the adapters of the ten jobs that `benchmarks.gpu` draws: eight of one, none, and two at once."""
    largest = max(kind.rank for kind in ADAPTERS)
    kinds = [
        Kind(
            model.largest_rank if kind.rank == largest else kind.rank,
            model.linear if kind.is_all_linear else model.attention,
        )
        for kind in ADAPTERS
    ]
    return [*([kind] for kind in kinds), [], [kinds[0], kinds[2]]]


class Rival:
    """Owner of a pipeline with every adapter of the ten jobs in it."""

    def __init__(self, cuda: FakeCuda, name: str, pixels: int) -> None:
        self.model = model_of(name, is_tiny=False)
        self._cuda = cuda
        self._pixels = pixels
        self._pipeline = build_pipeline(name)
        self._pipeline.set_progress_bar_config(disable=True)
        schedulers = self.model.family.schedulers
        _, self._pipeline.scheduler = schedulers.make(None, self._pipeline.scheduler.config)
        # It asks the device, which has no values.
        self._pipeline.scheduler.index_for_timestep = lambda *_: 0
        self._denoiser = getattr(self._pipeline, self.model.denoiser)
        self.jobs = jobs_of(self.model)
        for kind in {kind for job in self.jobs for kind in job}:
            self._inject(_name_of(kind), kind)
        largest = max(kind.rank for job in self.jobs for kind in job)
        self._inject(HOTSWAPPED, Kind(largest, self.model.linear))
        for component in self._pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                bring(component)
        self._launches_of([], NUM_STEPS)  # what is computed once and kept

    def preloaded(self, job: Sequence[Kind]) -> JobCost:
        """Return the cost of a job whose adapters are loaded, as P has it."""
        return self._cost([_name_of(kind) for kind in job], roofline.eager)

    def hotswapped(self) -> JobCost:
        """Return the cost of any job of B."""
        return self._cost([HOTSWAPPED], roofline.fused)

    def num_layers(self, job: Sequence[Kind]) -> int:
        """Count the layers of the denoiser that the job's adapters change, those of two adapters twice."""
        return sum(_name_of(kind) in layer.r for kind in job for layer in self._adapted())

    def _inject(self, name: str, kind: Kind) -> None:
        suffixes = "|".join(map(re.escape, kind.endings))
        config = LoraConfig(r=kind.rank, lora_alpha=kind.rank, target_modules=rf".*\.({suffixes})")
        inject_adapter_in_model(config, self._denoiser, name, low_cpu_mem_usage=True)

    def _adapted(self) -> Iterator[Any]:
        return (module for module in self._denoiser.modules() if isinstance(module, BaseTunerLayer))

    def _cost(self, names: list[str], kernels: Callable[[list[Launch]], list[Work]]) -> JobCost:
        shorter, longer = (Part.of(kernels(self._launches_of(names, NUM_STEPS + more))) for more in (0, 1))
        step = longer.less(shorter)
        return JobCost(step, shorter.less(step, NUM_STEPS))

    def _launches_of(self, names: list[str], num_steps: int) -> list[Launch]:
        for layer in self._adapted():
            layer.enable_adapters(bool(names))
            layer.set_adapter(names)
        channels, side = self._denoiser.config.in_channels, self._pixels // 8
        is_flow = self.model.denoiser == "transformer"
        latents = torch.empty(
            1, channels, side, side, device=DEVICE, dtype=torch.float32 if is_flow else torch.bfloat16
        )
        with self._cuda.counting() as tally:
            self._pipeline(
                "a picture of thing 5, very very very very very red",
                width=self._pixels,
                height=self._pixels,
                num_inference_steps=num_steps,
                guidance_scale=self.model.guidance,
                latents=latents,
                output_type="pt",
            )
        return tally.launches["outside"]


def _name_of(kind: Kind) -> str:
    return f"rank_{kind.rank}_{len(kind.endings)}"
