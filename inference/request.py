"""What crosses the engine's boundary, free of torch: requests in, steps and pictures out, errors by name."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

# What a request is by the source it brings: none, a picture, a picture and a mask.
KINDS = ("text2image", "image2image", "inpaint")


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """A LoRA adapter on the local disk: the safetensors file, a PEFT folder's config beside it, and its scale.

    `version` identifies the content wherever it came from: equal versions are the same bytes, however often the files
    were fetched or touched. Empty for local files, which are identified by path, inode, size and modification time.
    """

    weights: Path
    config: Path | None
    scale: float
    version: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """The picture that lanes begin from, of the request's size: `rgb` holds rows of pixels of three bytes.

    `strength` from above 0 to 1: the part of the steps that is taken. Where there is a `mask`, a byte a pixel, only
    what is 255 in it is repainted (as diffusers rounds it, from 128 on).
    """

    rgb: bytes
    strength: float
    mask: bytes | None = None


@dataclass(frozen=True, slots=True)
class Control:
    """A picture of the request's size (`rgb` as in `Source`) that the drawing follows, by the ControlNet `model`.

    `start` and `end` are fractions of the steps; `scale` 1 is as the ControlNet was trained. With `finds_edges` it is
    shown not the picture but its edges, as Canny finds them.
    """

    model: str
    rgb: bytes
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    finds_edges: bool = False


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One job's pictures: one lane for each seed. Sizes in pixels, already multiples of the family's.

    `cfg_normalization` (0: none) and `cfg_truncation` are Z-Image's, as its pipeline takes them. `arrived_at`
    (`time.monotonic()`) is when the job came in: the oldest gets the first free lane.
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
    cfg_normalization: float = 0.0
    cfg_truncation: float = 1.0
    arrived_at: float = 0.0

    @property
    def kind(self) -> str:
        """Which of the `KINDS` it is."""
        if self.source is None:
            return "text2image"
        return "image2image" if self.source.mask is None else "inpaint"


@dataclass(frozen=True, slots=True)
class Preview:
    """How far a request's first picture is, at the size of its latents; `rgb` as in `Picture`."""

    width: int
    height: int
    rgb: bytes


@dataclass(frozen=True, slots=True)
class StepReport:
    """Step `step_index` of `num_steps` is done by all of the request's lanes (0: denoising begins). Only the steps that
    are really taken count: with a source fewer than were asked for.

    `seconds` have passed since the step before, other requests' turns included. A `preview` may be of a step before.
    """

    step_index: int
    num_steps: int
    seconds: float
    preview: Preview | None = None


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What the engine holds after a turn of its loop: `num_batched` lanes shared the turn's forward (0: it had none),
    `num_lanes` are being denoised now, and the adapter slots by state."""

    num_batched: int
    num_lanes: int
    slots_active: int
    slots_idle: int
    slots_free: int

    @property
    def emptied(self) -> "EngineLoad":
        """The load without a lane, with all slots free."""
        num_slots = self.slots_active + self.slots_idle + self.slots_free
        return EngineLoad(num_batched=0, num_lanes=0, slots_active=0, slots_idle=0, slots_free=num_slots)


@dataclass(frozen=True, slots=True)
class Stage:
    """A named stretch of time; `started_at` is `time.monotonic()`, which all processes of a Linux host share."""

    name: str
    started_at: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Picture:
    """A finished picture: `rgb` holds `height` rows of `width` pixels of three bytes."""

    width: int
    height: int
    rgb: bytes
    seed: int


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """The pictures in the order of the request's seeds, what they were drawn with, and where the time went.

    `num_inference_steps` are those that were asked for.
    """

    pictures: tuple[Picture, ...]
    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    stages: tuple[Stage, ...]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the loaded model is. `base_size` (pixels) is the side of its 1:1 picture; sizes are multiples of
    `size_multiple`; steps and guidance default to the family's. `step_seconds` was measured by a warm-up at base size.
    `model` is the name told to backends; `kinds` are those it draws, `controls` the ControlNets a request may name."""

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
    kinds: tuple[str, ...] = KINDS
    controls: tuple[str, ...] = ()


OnStep = Callable[[StepReport], None]
OnLoadReport = Callable[[EngineLoad], None]
IsCancelled = Callable[[], bool]


class Engine(Protocol):
    """The engine's interface, the same in this process and in one of its own.

    `generate` returns at once; requests are drawn together, as many lanes as there is room for. The future ends with a
    `GenerationResult` or one of the errors above; cancelling it works until drawing begins (the report of step 0), and
    `is_cancelled` from then on. `on_step` runs on the engine's thread: be quick.
    """

    def generate(
        self, request: GenerationRequest, on_step: OnStep, is_cancelled: IsCancelled
    ) -> Future[GenerationResult]: ...

    def close(self) -> None: ...
