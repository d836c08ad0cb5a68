"""The values that cross the engine's boundary, free of torch: requests in, step reports and images out."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from config.model import DEFAULT_MODEL

# Kinds of requests, by their images: none, a source, a source and a mask, references.
KINDS = ("text2image", "image2image", "inpaint", "edit")
# Those of every family but where it says otherwise: few models read references.
USUAL_KINDS = KINDS[:3]
# The area to which the pipelines that read references shrink larger ones.
MAX_REFERENCE_PIXELS = 1024 * 1024


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """A LoRA adapter on the local disk: the safetensors file, a PEFT folder's config beside it, and its scale.

    `version` identifies the content: equal versions are the same bytes, however often the files were downloaded or
    touched. Empty for local files, which are identified by path, inode, size and modification time.
    """

    weights: Path
    config: Path | None
    scale: float
    version: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """The init image, of the request's size: `rgb` holds rows of pixels of three bytes.

    `strength`, above 0 and up to 1: the part of the steps that is taken. Where there is a `mask`, a byte a pixel, only
    its 255 is repainted (as diffusers rounds it, from 128 on).
    """

    rgb: bytes
    strength: float
    mask: bytes | None = None


@dataclass(frozen=True, slots=True)
class Control:
    """A control image of the request's size (`rgb` as in `Source`) for the ControlNet `model`.

    `start` and `end` are fractions of the steps; `scale` 1 is as the ControlNet was trained. With `finds_edges` its
    input is not the image but the image's edges, as Canny finds them.
    """

    model: str
    rgb: bytes
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    finds_edges: bool = False


@dataclass(frozen=True, slots=True)
class Reference:
    """An image that the model reads beside the prompt, of up to `MAX_REFERENCE_PIXELS`; `rgb` as in `Source`."""

    width: int
    height: int
    rgb: bytes


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """The images of one job: one lane for each seed. Sizes in pixels, already multiples of the family's.

    `guidance_rescale` (0: none) is of the families with a UNet, `cfg_normalization` (0: none) and `cfg_truncation` are
    Z-Image's, `true_cfg_scale` (1: none) is FLUX.1's and Qwen-Image's, as in their pipelines. `arrived_at`
    (`time.monotonic()`) is the job's arrival: the oldest gets the first free lane. `model` is one of the settings'
    `model_names`.
    """

    request_id: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seeds: tuple[int, ...]
    scheduler: str | None = None
    adapters: tuple[AdapterFile, ...] = ()
    source: Source | None = None
    control: Control | None = None
    references: tuple[Reference, ...] = ()
    guidance_rescale: float = 0.0
    cfg_normalization: float = 0.0
    cfg_truncation: float = 1.0
    true_cfg_scale: float | None = None
    arrived_at: float = 0.0
    model: str = DEFAULT_MODEL

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        if self.source is None:
            return "edit" if self.references else "text2image"
        return "image2image" if self.source.mask is None else "inpaint"


@dataclass(frozen=True, slots=True)
class Preview:
    """The request's first image as denoised so far, at the size of its latents; `rgb` as in `RawImage`."""

    width: int
    height: int
    rgb: bytes


@dataclass(frozen=True, slots=True)
class StepReport:
    """Step `step_index` of `num_steps` is done by all of the request's lanes (0: denoising begins). Only steps that are
    taken count: with a source fewer than were requested.

    `seconds` since the step before, other requests' turns included. A `preview` may be of an earlier step.
    """

    step_index: int
    num_steps: int
    seconds: float
    preview: Preview | None = None


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """One of several models: whether it is on the device, its requests that have not begun, its lanes and slots."""

    name: str
    is_on_device: bool
    num_waiting: int
    num_lanes: int
    slots_active: int
    slots_idle: int


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """The engine's load after a turn of its loop: `num_batched` lanes shared the turn's forward (0: there was none),
    `num_lanes` are being denoised now, and the adapter slots by state.

    Where there are several, `models` has each of them, and `switching_to` is the one that comes to the device now.
    """

    num_batched: int
    num_lanes: int
    slots_active: int
    slots_idle: int
    slots_free: int
    switching_to: str = ""
    models: tuple[ModelLoad, ...] = ()

    @property
    def emptied(self) -> "EngineLoad":
        """The load without a lane, with all slots free."""
        num_slots = self.slots_active + self.slots_idle + self.slots_free
        emptied = (replace(one, num_waiting=0, num_lanes=0, slots_active=0, slots_idle=0) for one in self.models)
        return EngineLoad(
            num_batched=0, num_lanes=0, slots_active=0, slots_idle=0, slots_free=num_slots, models=tuple(emptied)
        )


NO_LOAD = EngineLoad(num_batched=0, num_lanes=0, slots_active=0, slots_idle=0, slots_free=0)


@dataclass(frozen=True, slots=True)
class Stage:
    """A timed part of a job; `started_at` is `time.monotonic()`, which all processes of a Linux host share."""

    name: str
    started_at: float
    seconds: float


@dataclass(frozen=True, slots=True)
class RawImage:
    """A finished image: `rgb` holds `height` rows of `width` pixels of three bytes."""

    width: int
    height: int
    rgb: bytes
    seed: int


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """The images in the order of the request's seeds, the parameters they were drawn with, and the timed stages.

    `num_inference_steps` as requested.
    """

    images: tuple[RawImage, ...]
    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    stages: tuple[Stage, ...]
    guidance_rescale: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The loaded model. `base_size` (pixels) is the side of its 1:1 image; sizes are multiples of `size_multiple`;
    steps and guidance default to the family's. `step_seconds` was measured by a warm-up at base size. `model` is the
    name for backends; `kinds` are the kinds of requests it draws, `controls` the ControlNets a request may name."""

    model: str
    family: str
    base_size: int
    size_multiple: int
    default_steps: int
    default_guidance: float
    schedulers: tuple[str, ...]
    device: str
    dtype: str
    load_seconds: float
    step_seconds: float
    kinds: tuple[str, ...] = USUAL_KINDS
    controls: tuple[str, ...] = ()


OnStep = Callable[[StepReport], None]
OnLoadReport = Callable[[EngineLoad], None]
IsCancelled = Callable[[], bool]


class Engine(Protocol):
    """The engine's interface, the same in this process and in one of its own.

    `generate` returns at once; requests are batched, as many lanes as there is room for. The future resolves to a
    `GenerationResult` or an `EngineError`; cancelling it works until the request begins (the report of step 0), and
    `is_cancelled` from then on. `on_step` runs on the engine's thread and must not block.
    """

    def generate(
        self, request: GenerationRequest, on_step: OnStep, is_cancelled: IsCancelled
    ) -> Future[GenerationResult]: ...

    def close(self) -> None: ...
