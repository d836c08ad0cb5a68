"""Reference images of a job: init, mask, control and those of an edit, and the engine's inputs made from them."""

from dataclasses import dataclass, replace
from typing import Protocol

from PIL import Image

from config.redacting import quoted
from inference.request import MAX_REFERENCE_PIXELS, Control, ModelFacts, Reference, Source
from watermark.resizing import Fit, fit
from worker.errors import ErrorCode, JobFailed
from worker.messages.job import Job, Kind, Preprocess, resolve_size

# A mask made over a smaller copy of the image is off by a pixel at the edges.
MASK_TOLERANCE = 0.02
# What is greyer than this is kept.
MASK_THRESHOLD = 128
# FLUX.2's limits of references.
MIN_SIDE, MAX_REFERENCE_ASPECT = 64, 8
BLACK_OR_WHITE = [255 if value >= MASK_THRESHOLD else 0 for value in range(256)]


@dataclass(frozen=True, slots=True)
class References:
    """Decoded images of any size: init and control RGB, mask L. Those of an edit, `edited`, are RGB and shrunk already.

    `original`: size of the image that sets the aspect ratio, kept after that image was resized.
    """

    init: Image.Image | None = None
    mask: Image.Image | None = None
    control: Image.Image | None = None
    original: tuple[int, int] | None = None
    edited: tuple[Image.Image, ...] = ()

    @property
    def proportions(self) -> tuple[int, int] | None:
        """Width and height that set the aspect ratio where the job names no size; None without an image."""
        shown = next((image for image in (self.init, self.control, *self.edited) if image), None)
        return self.original or (shown.size if shown else None)

    def at(self, size: tuple[int, int], how: Fit) -> "References":
        """Return the images resized to the generated size, which a job may hold for minutes. `proportions` is kept."""
        return replace(
            self,
            init=None if self.init is None else fit(self.init, size, how),
            mask=None if self.mask is None else mask_at(self.mask, size, how),
            control=None if self.control is None else fit(self.control, size, how),
            original=self.proportions,
        )

    def source_for(self, job: Job, size: tuple[int, int]) -> Source | None:
        """Return the engine's source image and mask; None for text to image."""
        if self.init is None or job.source is None:
            return None
        mask = None if self.mask is None else mask_at(self.mask, size, job.fit).tobytes()
        return Source(fit(self.init, size, job.fit).tobytes(), job.source.strength, mask)

    def control_for(self, job: Job, size: tuple[int, int]) -> Control | None:
        """Return the engine's control; None without one."""
        if self.control is None or job.control is None:
            return None
        asked = job.control
        return Control(
            model=asked.model,
            rgb=fit(self.control, size, job.fit).tobytes(),
            scale=asked.scale,
            start=asked.start,
            end=asked.end,
            finds_edges=asked.preprocess is Preprocess.CANNY,
        )

    def for_edit(self) -> tuple[Reference, ...]:
        """Return the engine's references; none unless the job is an edit."""
        return tuple(Reference(*image.size, image.tobytes()) for image in self.edited)


NO_REFERENCES = References()


def output_size(job: Job, facts: ModelFacts, reference: tuple[int, int] | None) -> tuple[int, int]:
    """Return width and height in px of the job's images; `reference` sets the ratio where the job names no size."""
    return resolve_size(job, base_size=facts.base_size, size_multiple=facts.size_multiple, reference=reference)


class ModelCapabilities(Protocol):
    """What a model can do, loaded or not: its name, its kinds of request, and the ControlNets one may name."""

    @property
    def model(self) -> str: ...

    @property
    def kinds(self) -> tuple[str, ...]: ...

    @property
    def controls(self) -> tuple[str, ...]: ...


def check_supported(job: Job, facts: ModelCapabilities) -> None:
    """Raise `JobFailed` for a kind or a ControlNet that the model lacks; runs before anything is fetched."""
    needed = {job.kind}
    if job.product is not None:
        # The kinds of its requests: the background unless it is given, and inpainting to refine.
        has_background = job.product.background_ref is not None or job.product.composite_ref is not None
        needed = set() if has_background else {Kind.TEXT2IMAGE}
        needed |= {Kind.INPAINT} if job.product.refine_strength > 0 else set()
    if not needed <= set(facts.kinds):
        can = ", ".join(facts.kinds)
        raise JobFailed(
            ErrorCode.UNSUPPORTED_BY_MODEL, f"kind {job.kind}: the loaded model {facts.model} can only {can}"
        )
    if job.control is not None and job.control.model not in facts.controls:
        known = f"knows {', '.join(facts.controls)}" if facts.controls else "has no ControlNets"
        reason = f"control.model {quoted(job.control.model)} is not known: this worker {known}"
        raise JobFailed(ErrorCode.UNSUPPORTED_BY_MODEL, reason)


def check_mask(mask: Image.Image, size: tuple[int, int]) -> None:
    """Raise `JobFailed` where a mask's aspect ratio is not that of its image of `size`, or nothing in it is white."""
    difference = (mask.width * size[1]) / (mask.height * size[0])
    if not 1 - MASK_TOLERANCE <= difference <= 1 + MASK_TOLERANCE:
        reason = f"the mask is {mask.width}x{mask.height} px and the picture {size[0]}x{size[1]}"
        raise JobFailed(ErrorCode.IMAGE_INVALID, f"mask_path: {reason}: both must have the same proportions")
    if mask.point(BLACK_OR_WHITE).getbbox() is None:
        raise JobFailed(
            ErrorCode.IMAGE_INVALID, "mask_path: nothing in the mask is white, so nothing would be repainted"
        )


def shrunk(image: Image.Image) -> Image.Image:
    """Return an edit's image at no more than `MAX_REFERENCE_PIXELS`, its shape kept. Raises `JobFailed` for a strip."""
    longest, shortest = max(image.size), min(image.size)
    if shortest < MIN_SIDE or longest > MAX_REFERENCE_ASPECT * shortest:
        reason = f"the picture is {image.width}x{image.height} px; an edit reads pictures of {MIN_SIDE} px and more"
        raise JobFailed(ErrorCode.IMAGE_INVALID, f"{reason} on a side, up to {MAX_REFERENCE_ASPECT} to 1")
    scale = (MAX_REFERENCE_PIXELS / (image.width * image.height)) ** 0.5
    if scale >= 1:
        return image
    # As diffusers' pipelines, pixel by pixel.
    return image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.LANCZOS)


def mask_at(mask: Image.Image, size: tuple[int, int], how: Fit) -> Image.Image:
    """Return the mask at the generated size, thresholded to black and white."""
    return fit(mask, size, how).point(BLACK_OR_WHITE)
