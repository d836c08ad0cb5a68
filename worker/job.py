"""The decoded, validated unit of work, and the two ways a message can fail to be one."""

from dataclasses import dataclass
from datetime import datetime

from clients.location import ObjectRef
from watermark.signature import SignatureStyle

# Beyond this a picture is more border than subject; 9999:1 would be one row of latents.
MAX_ASPECT = 4.0


class Undecodable(Exception):
    """The body holds no id to be trusted: nobody can be told, so the message itself goes to the dead letters."""


class JobRejected(Exception):
    """The job is known but asks for what cannot be done: its backend is told `code` and the message."""

    def __init__(self, code: str, message: str, *, task_id: str, generation_id: int) -> None:
        super().__init__(message)
        self.code = code
        self.task_id = task_id
        self.generation_id = generation_id


@dataclass(frozen=True, slots=True)
class JobAdapter:
    """Where an adapter's file or folder is, and how strongly it applies."""

    ref: ObjectRef
    scale: float


@dataclass(frozen=True, slots=True)
class Job:
    """What a message asks for, both dialects resolved, every value within its limits.

    `size` (width, height) wins over `aspect` where it is set. `seed` is never absent: a null one is derived from
    `task_id`, so that a repeated run draws the same picture. Steps and guidance that nobody named are the family's.
    """

    task_id: str
    generation_id: int
    prompt: str
    negative_prompt: str
    adapters: tuple[JobAdapter, ...]
    size: tuple[int, int] | None
    aspect: tuple[int, int]
    seed: int
    num_images: int
    num_inference_steps: int | None
    guidance_scale: float | None
    cfg_normalization: float
    cfg_truncation: float
    scheduler: str | None
    signature_ref: ObjectRef | None
    artist_name: str | None
    signature_style: SignatureStyle
    prompt_tags: tuple[str, ...]
    created_at: datetime | None

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.seed + index for index in range(self.num_images))


def resolve_size(job: Job, *, base_size: int, size_multiple: int) -> tuple[int, int]:
    """The width and height, in pixels, this job's pictures really get on a model of that base size.

    1:1, 2:2, 1:2 and 2:1 count in base sizes; any other ratio keeps the area of the base square.
    """
    if job.size is not None:
        width, height = (float(side) for side in job.size)
    elif max(job.aspect) <= 2:
        width, height = (float(base_size * side) for side in job.aspect)
    else:
        ratio = job.aspect[0] / job.aspect[1]
        width, height = base_size * ratio**0.5, base_size / ratio**0.5
    return _to_multiple(width, size_multiple), _to_multiple(height, size_multiple)


def _to_multiple(pixels: float, multiple: int) -> int:
    return max(multiple, round(pixels / multiple) * multiple)
