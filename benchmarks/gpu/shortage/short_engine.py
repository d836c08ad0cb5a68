"""The engine on a model that notes its forwards and decodings, and takes its memory from one that can end early."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from benchmarks.gpu.models.bench_model import BenchModel
from benchmarks.gpu.models.engine import BenchEngine
from benchmarks.gpu.shortage.memory import Memory
from config.model import ModelSettings
from inference.device.decoded_image import DecodedImage
from inference.lane import Lane
from inference.lora.adapter import Adapter
from inference.lora.bank import PackedAdapter
from inference.models.base import Family
from inference.request import GenerationRequest, GenerationResult, StepReport

# The stand-in's measure, in values of latents: about what the real ones are to one another.
DECODING_WHOLE, DECODING_TILES = 8, 2


class NotedFamily(Family):
    """Laid over a loaded family. `batches`: the lanes of each forward tried; `tiles`: of each decoding tried, whether
    it went by tiles."""

    memory: Memory
    batches: list[int]
    tiles: list[bool]

    def denoise(self, lanes: Sequence[Lane]) -> list[torch.Tensor]:
        self.batches.append(len(lanes))
        request = lanes[0].owner.request
        values = sum(lane.num_rows for lane in lanes) * _num_values(request.width, request.height)
        with self.memory.noting(("forward", len(lanes), request.width), values):
            return super().denoise(lanes)

    def decode(self, latents: torch.Tensor, *, in_tiles: bool = False) -> DecodedImage:
        self.tiles.append(in_tiles)
        values = latents.numel() * (DECODING_TILES if in_tiles else DECODING_WHOLE)
        with self.memory.noting(("decoding", in_tiles, latents.shape[-1]), values):
            return super().decode(latents, in_tiles=in_tiles)

    def pack(self, adapter: Adapter) -> PackedAdapter:
        values = sum(layer.a.numel() + layer.b.numel() for layer in adapter.layers.values())
        self.memory.take(values)
        return super().pack(adapter)


class ShortEngine(BenchEngine):
    """The engine over such a model."""

    family: NotedFamily

    def __init__(self, model: BenchModel, pipeline: Any, device: torch.device, memory: Memory) -> None:
        self._memory = memory
        super().__init__(model, pipeline, device)
        self.forget()
        memory.peaks.clear()

    def forget(self) -> None:
        """Forget what was noted until now."""
        self.family.batches.clear()
        self.family.tiles.clear()

    def ask(
        self, request: GenerationRequest, on_step: Callable[[StepReport], None] = lambda _: None
    ) -> "Future[GenerationResult]":
        """Submit a request that is not a job of a set."""
        return self.generate(request, on_step, lambda: False)

    def _load(self, settings: ModelSettings, device: torch.device, dtype: torch.dtype) -> Family:
        family: Any = self.family
        family.__class__ = type(NotedFamily.__name__, (NotedFamily, type(family)), {})
        family.memory, family.batches, family.tiles = self._memory, [], []
        return self.family


def _num_values(width: int, height: int) -> int:
    """Count the values of the latents of one row."""
    return 4 * (width // 8) * (height // 8)
