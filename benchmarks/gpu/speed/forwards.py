"""Single forwards of a family: its bank filled with a set's adapters, and a lane for every job of the set."""

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.gpu.models.bench_model import BenchModel
from benchmarks.gpu.models.jobs import distinct_files, request_of
from benchmarks.sets import Job
from inference.engine.conditioner import Conditioner
from inference.lane import ActiveRequest, Conditioning, Embedding, Lane
from inference.lora.adapter_key import AdapterKey
from inference.lora.products.rows import AppliedAdapter, RowAdapters
from inference.models.base import Family


class Forwards:
    """Owner of a family of its own, on modules that nothing else runs."""

    def __init__(
        self,
        model: BenchModel,
        pipeline: Any,
        device: torch.device,
        jobs: Sequence[Job],
        conditionings: Sequence[Conditioning] | None = None,
    ) -> None:
        """`conditionings`: the jobs' prompts encoded before, so that two families can read the same ones."""
        self.model = model
        self.pipeline = pipeline
        self.family: Family = model.family_of(pipeline, device)
        with torch.inference_mode():
            self.rows = fill_bank(self.family, jobs)
            self.lanes = [self._lane(job, row) for job, row in zip(jobs, self.rows, strict=True)]
            if conditionings is None:
                conditionings = Conditioner(self.family).condition([lane.owner for lane in self.lanes])
            for lane, conditioning in zip(self.lanes, conditionings, strict=True):
                lane.owner.conditioning = conditioning

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipeline, self.model.denoiser)

    @property
    def conditionings(self) -> list[Conditioning]:
        return [lane.owner.conditioning for lane in self.lanes if lane.owner.conditioning is not None]

    def step(self, num_lanes: int, *, has_adapters: bool) -> list[torch.Tensor]:
        """Run one forward of the first lanes, a guided prediction each. No lane advances."""
        for lane, row in zip(self.lanes, self.rows, strict=True):
            lane.owner.row = row if has_adapters else ()
        with torch.inference_mode():
            return self.family.denoise(self.lanes[:num_lanes])

    def step_alone(self, number: int) -> torch.Tensor:
        """Run one forward of one lane without the bank, on the modules alone."""
        self.lanes[number].owner.row = ()
        with torch.inference_mode():
            return self.family.denoise([self.lanes[number]])[0]

    def _lane(self, job: Job, row: RowAdapters) -> Lane:
        request = request_of(job, self.model)
        self.family.prepare(request)
        keys = tuple(AdapterKey.of(file) for file in request.adapters)
        active = ActiveRequest(request, self.family.batch_traits(request), lambda _: None, lambda: False, keys)
        active.row = row
        (lane,) = active.lanes
        _, lane.sampler = self.family.begin(lane)
        return lane


def fill_bank(family: Family, jobs: Sequence[Job]) -> list[RowAdapters]:
    """Write every adapter into pages of its own; each job's row."""
    places: dict[Any, tuple[int, ...]] = {}
    next_page = 1  # page 0 is zero
    for path in distinct_files(jobs):
        packed = family.pack(family.read_adapter(path, None))
        places[path] = tuple(range(next_page, next_page + packed.num_pages))
        next_page += packed.num_pages
        family.bank.write(places[path], packed)
    return [tuple(AppliedAdapter(places[path], scale) for path, scale in job.adapters) for job in jobs]


def cast(conditioning: Conditioning, dtype: torch.dtype) -> Conditioning:
    """Cast the embeddings to another dtype."""
    negative = conditioning.negative
    return Conditioning(_cast(conditioning.positive, dtype), None if negative is None else _cast(negative, dtype))


def _cast(embedding: Embedding, dtype: torch.dtype) -> Embedding:
    pooled = embedding.pooled
    return Embedding(embedding.tokens.to(dtype), None if pooled is None else pooled.to(dtype))
