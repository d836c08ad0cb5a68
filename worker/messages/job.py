"""The decoded, validated job, and the two errors of a message that is none."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from clients.storage.location import ObjectRef
from config.model import DEFAULT_MODEL
from watermark.product.placement import Layout
from watermark.resizing import Fit
from watermark.signature import SignatureStyle
from watermark.text.overlay import TextOverlay
from worker.messages.generation_id import GenerationId

# Beyond this a picture is more border than subject; 9999:1 would be one row of latents.
MAX_ASPECT = 4.0
NUM_SEEDS = 2**63


class Kind(StrEnum):
    """What sort of picture a job asks for."""

    TEXT2IMAGE = "text2image"
    IMAGE2IMAGE = "image2image"
    INPAINT = "inpaint"
    PRODUCT = "product"
    EDIT = "edit"


class Preprocess(StrEnum):
    """What is made of a control picture before a ControlNet sees it."""

    NONE = "none"
    CANNY = "canny"


class Undecodable(Exception):
    """The body holds no valid id: no webhook can name it, so the message is dead-lettered."""


class JobRejected(Exception):
    """The job has an id but cannot be done: `code` and the message go into the failed webhook."""

    def __init__(self, code: str, message: str, *, task_id: str, generation_id: GenerationId) -> None:
        super().__init__(message)
        self.code = code
        self.task_id = task_id
        self.generation_id = generation_id


@dataclass(frozen=True, slots=True)
class JobAdapter:
    """Location of an adapter's file or folder, and its scale."""

    ref: ObjectRef
    scale: float


@dataclass(frozen=True, slots=True)
class JobSource:
    """The init image of a job; with `mask_ref` only what is white there is repainted."""

    image_ref: ObjectRef
    mask_ref: ObjectRef | None
    strength: float


@dataclass(frozen=True, slots=True)
class JobControl:
    """The ControlNet input of a job. See `inference.request.Control`."""

    image_ref: ObjectRef
    model: str
    scale: float
    start: float
    end: float
    preprocess: Preprocess


@dataclass(frozen=True, slots=True)
class JobProduct:
    """The fields of a product job. A stage whose image is given is skipped; `composite_ref` comes with `cutout_ref`."""

    image_ref: ObjectRef | None
    cutout_ref: ObjectRef | None
    background_ref: ObjectRef | None
    composite_ref: ObjectRef | None
    layout: Layout
    shadow: float
    refine_strength: float


@dataclass(frozen=True, slots=True)
class Job:
    """A validated job, both dialects resolved, every value within its limits.

    `size` (width, height) wins over `aspect` where it is set; without both a reference picture's proportions hold.
    `seed` is never absent: a null one is derived from `task_id`, so that a repeated run makes the same picture. Steps
    and guidance of None are the family's defaults. `source` is set for image2image and inpaint, `product` for product,
    `references` for edit, and for no other kind. `fit` is for every reference picture but those of `references`, which
    keep their shape. `ignored` names the unknown fields. `model` is one of the worker's.
    """

    task_id: str
    generation_id: GenerationId
    prompt: str
    negative_prompt: str
    adapters: tuple[JobAdapter, ...]
    size: tuple[int, int] | None
    aspect: tuple[int, int] | None
    seed: int
    num_images: int
    num_inference_steps: int | None
    guidance_scale: float | None
    cfg_normalization: float
    cfg_truncation: float
    true_cfg_scale: float | None
    scheduler: str | None
    signature_ref: ObjectRef | None
    artist_name: str | None
    signature_style: SignatureStyle
    prompt_tags: tuple[str, ...]
    created_at: datetime | None
    kind: Kind = Kind.TEXT2IMAGE
    source: JobSource | None = None
    control: JobControl | None = None
    product: JobProduct | None = None
    references: tuple[ObjectRef, ...] = ()
    fit: Fit = Fit.COVER
    overlays: tuple[TextOverlay, ...] = ()
    style: str | None = None
    industry: str | None = None
    ignored: tuple[str, ...] = ()
    guidance_rescale: float = 0.0
    model: str = DEFAULT_MODEL

    @property
    def seeds(self) -> tuple[int, ...]:
        # Behind the highest seed comes 0: all of them fit a signed 64-bit column and a torch.Generator.
        return tuple((self.seed + index) % NUM_SEEDS for index in range(self.num_images))


def resolve_size(
    job: Job, *, base_size: int, size_multiple: int, reference: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Return the width and height, in pixels, of this job's pictures on a model of that base size.

    1:1, 2:2, 1:2 and 2:1 count in base sizes; any other ratio keeps the area of the base square. Without a ratio in the
    job it is that of its `reference` picture, within the limits, or 1:1.
    """
    if job.size is not None:
        width, height = (float(side) for side in job.size)
    elif job.aspect is not None and max(job.aspect) <= 2:
        width, height = (float(base_size * side) for side in job.aspect)
    else:
        across, down = job.aspect or reference or (1, 1)
        ratio = min(MAX_ASPECT, max(1 / MAX_ASPECT, across / down))
        width, height = base_size * ratio**0.5, base_size / ratio**0.5
    return _to_multiple(width, size_multiple), _to_multiple(height, size_multiple)


def _to_multiple(pixels: float, multiple: int) -> int:
    return max(multiple, round(pixels / multiple) * multiple)
