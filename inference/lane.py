"""A request while it is in the engine, and its lanes: one for each image."""

import time
from collections import deque
from collections.abc import Hashable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

from inference.controlnet.guide import Guide
from inference.device.device import Mark
from inference.latents.source import EncodedSource
from inference.lora.adapter_key import AdapterKey, ReadAdapter
from inference.lora.products.rows import RowAdapters
from inference.lora.slots import Slot
from inference.request import (
    GenerationRequest,
    GenerationResult,
    IsCancelled,
    OnStep,
    Preview,
    RawImage,
    Stage,
    StepReport,
)
from inference.sampling.samplers import Sampler


@dataclass(frozen=True, slots=True)
class Embedding:
    """A text encoder's output: [tokens, width], and where the family has them a pooled [width] and a mask [tokens]."""

    tokens: torch.Tensor
    pooled: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """The tensors that it has."""
        return tuple(part for part in (self.tokens, self.pooled, self.mask) if part is not None)

    def copied(self) -> "Embedding":
        """Return a copy of its own memory."""
        pooled, mask = (None if part is None else part.clone() for part in (self.pooled, self.mask))
        return Embedding(self.tokens.clone(), pooled, mask)


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Embeddings of the prompt and, under guidance, of the negative prompt."""

    positive: Embedding
    negative: Embedding | None


class BatchTraits(NamedTuple):
    """A request's place in batches: lanes of one `shape` share a forward, a guided lane has two rows in it.

    `num_steps`: the denoise steps that are taken, with a source fewer than were requested.
    """

    shape: Hashable
    is_guided: bool
    num_steps: int


@dataclass(eq=False)
class ActiveRequest:
    """One request in the engine. Owned by the engine's thread; the future alone is shared.

    When its first lane joins, it gets `held` (its adapters' slots), `row` (their pages and scales, for the bank),
    `conditioning`, and where the request has them `guide` (of its control), `source` and `references`, encoded.
    """

    request: GenerationRequest
    traits: BatchTraits
    on_step: OnStep
    is_cancelled: IsCancelled
    keys: tuple[AdapterKey, ...]
    future: Future[GenerationResult] = field(default_factory=Future)
    scheduling: Future[None] = field(default_factory=Future)
    readings: dict[AdapterKey, Future[ReadAdapter]] = field(default_factory=dict)
    control_image: Future[torch.Tensor] | None = None
    held: dict[AdapterKey, Slot] = field(default_factory=dict)
    row: RowAdapters = ()
    guide: Guide | None = None
    conditioning: Conditioning | None = None
    source: EncodedSource | None = None
    references: torch.Tensor | None = None
    scheduler: str = ""
    stages: list[Stage] = field(default_factory=list)
    images: dict[int, RawImage] = field(default_factory=dict)
    num_ooms: int = 0  # times that there was no memory for it to begin, beside others and alone
    num_ooms_alone: int = 0
    preview: Preview | None = None  # for the next report
    _num_steps_noted: int = 0
    _unreported: deque[tuple[int, Mark]] = field(default_factory=deque)
    _reported_until: Mark = field(default_factory=Mark)
    _is_begun: bool | None = None  # False: its future was cancelled before it began

    @cached_property
    def lanes(self) -> tuple["Lane", ...]:
        """One lane for each seed."""
        return tuple(Lane(self, number) for number in range(len(self.request.seeds)))

    @property
    def is_guided(self) -> bool:
        return self.traits.is_guided

    @property
    def is_begun(self) -> bool:
        return bool(self._is_begun)

    @property
    def is_ended(self) -> bool:
        return self.future.done()

    @property
    def is_denoised(self) -> bool:
        return all(lane.is_denoised for lane in self.lanes)

    @property
    def is_decoded(self) -> bool:
        return len(self.images) == len(self.lanes)

    def begin(self) -> bool:
        """Make `future.cancel()` ineffective from the first call on; False if the future was cancelled before."""
        if self._is_begun is None:
            self._is_begun = self.future.set_running_or_notify_cancel()
        return self._is_begun

    def note_stage(self, name: str, started_at: float) -> None:
        """Record a stage that ends now."""
        self.stages.append(Stage(name, started_at, time.monotonic() - started_at))

    @property
    def last_stage_ended_at(self) -> float:
        return self.stages[-1].started_at + self.stages[-1].seconds

    def report_begin(self, now: Mark) -> None:
        """Report step 0."""
        self._reported_until = now
        self.on_step(StepReport(0, self.traits.num_steps, 0.0))

    def note_steps(self, launched: Mark) -> None:
        """Record the step that all lanes have reached, if it is a new one. The device ends it at `launched`."""
        num_done = sum(lane.num_steps_done for lane in self.lanes) // len(self.lanes)
        if num_done > self._num_steps_noted:
            self._num_steps_noted = num_done
            self._unreported.append((num_done, launched))

    def report_steps(self) -> None:
        """Report the steps that the device has ended, which may be all but the last of those launched.

        A step's seconds are by the device's clock, from the end of the step before, so that they add up to the whole,
        for the estimate of the time left. By the host's clock a step on a GPU takes as long as its launch.
        """
        while self._unreported and self._unreported[0][1].is_past:
            num_done, ended = self._unreported.popleft()
            seconds, preview = ended.seconds_since(self._reported_until), self.preview
            self.preview, self._reported_until = None, ended
            self.on_step(StepReport(num_done, self.traits.num_steps, seconds, preview))

    def result(self) -> GenerationResult:
        """Return all images, in the order of the seeds."""
        return GenerationResult(
            images=tuple(self.images[lane.number] for lane in self.lanes),
            scheduler=self.scheduler,
            num_inference_steps=self.request.num_inference_steps,
            guidance_scale=self.request.guidance_scale,
            guidance_rescale=self.request.guidance_rescale if self.is_guided else 0.0,
            stages=tuple(self.stages),
        )


@dataclass(eq=False)
class Lane:
    """One image being denoised, of the request `owner`. It has a `sampler` from joining on."""

    owner: ActiveRequest
    number: int
    sampler: Sampler | None = None

    @property
    def seed(self) -> int:
        return self.owner.request.seeds[self.number]

    @property
    def shape(self) -> Hashable:
        return self.owner.traits.shape

    @property
    def num_rows(self) -> int:
        return 2 if self.owner.is_guided else 1

    @property
    def arrived_at(self) -> float:
        return self.owner.request.arrived_at

    @property
    def num_steps_done(self) -> int:
        """Denoise steps, of the owner's `num_steps`: a scheduler may take several forwards to one of them."""
        if self.sampler is None:
            return 0
        return self.sampler.step_index * self.owner.traits.num_steps // self.sampler.num_steps

    @property
    def guide(self) -> Guide | None:
        """The control of the next step; None where the request has none, or not at this step."""
        guide, sampler = self.owner.guide, self.sampler
        if guide is None or sampler is None or not guide.is_active(sampler.step_index, sampler.num_steps):
            return None
        return guide

    @property
    def is_denoised(self) -> bool:
        return self.sampler is not None and self.sampler.step_index == self.sampler.num_steps


def owners_of(lanes: Iterable[Lane]) -> list[ActiveRequest]:
    """Return the requests of the lanes, each once, in order."""
    return list(dict.fromkeys(lane.owner for lane in lanes))
