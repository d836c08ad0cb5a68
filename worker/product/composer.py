"""Composition of a product's image: cut out, generate a background, compose, refine. Stored stages are reused."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from PIL import Image

from inference.request import GenerationRequest, GenerationResult, RawImage, Source
from watermark.decoding import ImageMode
from watermark.geometry import Rect
from watermark.product.compositing import compose
from watermark.product.masks import product_mask, repaint_mask, restore_masked
from watermark.product.placement import fitted_size, place_product
from watermark.product.template_match import match_template
from watermark.resizing import fit
from worker.errors import ErrorCode, JobFailed
from worker.jobs.engine_client import GeneratedImages, ProgressSpan
from worker.jobs.runs import Phase
from worker.product.cutter import Cutter
from worker.product.inputs import ProductInputs
from worker.product.stage_store import ProductStage, StoredStage
from worker.results.image_store import NO_METADATA

# Metadata of a background, for the attempt that loads it.
SCHEDULER = "scheduler"
# The engine rounds steps down, and a product of floats may be just below a whole number.
ROUNDING_MARGIN = 1e-6


class GenerationContext(Protocol):
    """What a composer generates in: a job's run, or a command."""

    def generate(self, request: GenerationRequest, span: ProgressSpan) -> GenerationResult:
        """Have the engine generate, and report its steps within `span`."""

    def stage(self, phase: Phase) -> AbstractContextManager[None]:
        """Account the block's time to a stage."""

    def raise_if_unwanted(self) -> None:
        """Raise where the job was cancelled or is to be released."""


class Stages(Protocol):
    """Storage of the stages' images, see `StageStore`."""

    def find(self, stage: ProductStage, mode: ImageMode) -> StoredStage | None: ...

    def save(self, stage: ProductStage, image: Image.Image, metadata: Mapping[str, str] = NO_METADATA) -> None: ...


@dataclass(slots=True)
class ProductComposer:
    """Composes one job's image. `request` is for its background, which has the image's size; `scheduler` is the one
    that the engine used last, `background_steps` are those that the background still takes."""

    context: GenerationContext
    stages: Stages
    cutter: Cutter
    request: GenerationRequest
    inputs: ProductInputs
    scheduler: str
    background_steps: int = 0

    def generate(self) -> GeneratedImages:
        """Return the image without headline and signature, as the engine's result would be, and the product's rectangle
        in it. Raises `JobFailed`, and what the context, the cutter and the stages raise."""
        cutout = self._cutout()
        image, at = self._composite(cutout)
        if self.inputs.product.refine_strength > 0:
            if at is None:
                raise JobFailed(
                    ErrorCode.IMAGE_INVALID,
                    "product.composite_path: the cut-out is not to be found in it at the size of layout.scale, so"
                    " nothing could protect it: give the scale at which it stands there, or refine_strength 0",
                )
            image = self._refined(image, cutout, at)
        raw = RawImage(image.width, image.height, image.tobytes(), self.request.seeds[0])
        result = GenerationResult(
            (raw,),
            self.scheduler,
            self.request.num_inference_steps,
            self.request.guidance_scale,
            stages=(),
            guidance_rescale=self.request.guidance_rescale,
        )
        return GeneratedImages(result, () if at is None else (at,))

    def _cutout(self) -> Image.Image:
        if self.inputs.cutout is not None:
            return self.inputs.cutout
        with self._stage(Phase.CUT):
            stored = self.stages.find(ProductStage.CUTOUT, "RGBA")
            if stored is not None:
                return stored.image
            assert self.inputs.image is not None, "a job brings one or the other"  # noqa: S101
            cutout = self.cutter.cut(self.inputs.image, "product.image_path", self.context.raise_if_unwanted)
            self.stages.save(ProductStage.CUTOUT, cutout)
            return cutout

    def _composite(self, cutout: Image.Image) -> tuple[Image.Image, Rect | None]:
        """Return the composite, and the product's rectangle in it; None where it is not found."""
        if self.inputs.composite is not None:
            with self._stage(Phase.COMPOSE):
                return self.inputs.composite, self._place_in(self.inputs.composite, cutout)
        background = self._background()
        with self._stage(Phase.COMPOSE):
            stored = self.stages.find(ProductStage.COMPOSITE, "RGB")
            if stored is not None and stored.is_changed:
                composite = self._fitted(stored.image)
                return composite, self._place_in(composite, cutout)
            at = place_product(background, cutout.size, self.inputs.product.layout)
            if stored is not None:
                return self._fitted(stored.image), at
            composite = compose(background, cutout, at, shadow=self.inputs.product.shadow)
            self.stages.save(ProductStage.COMPOSITE, composite)
            return composite, at

    def _background(self) -> Image.Image:
        if self.inputs.background is not None:
            return self.inputs.background
        with self._stage(Phase.FETCH):
            stored = self.stages.find(ProductStage.BACKGROUND, "RGB")
        if stored is not None:
            self.scheduler = stored.metadata.get(SCHEDULER, self.scheduler)
            return self._fitted(stored.image)
        self.background_steps = self.request.num_inference_steps
        num_steps = self.background_steps + self._refining_steps
        background = self._generated(self.request, ProgressSpan(0, self.background_steps, num_steps))
        with self.context.stage(Phase.STORE):
            self.stages.save(ProductStage.BACKGROUND, background, {SCHEDULER: self.scheduler})
        return background

    def _refined(self, composite: Image.Image, cutout: Image.Image, at: Rect) -> Image.Image:
        with self._stage(Phase.FETCH):
            stored = self.stages.find(ProductStage.REFINED, "RGB")
        if stored is not None:
            return self._fitted(stored.image)
        mask = product_mask(composite.size, cutout, at)
        request = replace(
            self.request,
            request_id=f"{self.request.request_id}:refine",
            source=Source(composite.tobytes(), self._strength, repaint_mask(mask).tobytes()),
        )
        num_steps = self.background_steps + self._refining_steps
        refined = self._generated(request, ProgressSpan(self.background_steps, self._refining_steps, num_steps))
        with self.context.stage(Phase.COMPOSE):
            refined = restore_masked(refined, composite, mask)
            self.stages.save(ProductStage.REFINED, refined)
            return refined

    def _place_in(self, composite: Image.Image, cutout: Image.Image) -> Rect | None:
        """Return the product's rectangle in a composite that a person made or changed."""
        scale = self.inputs.product.layout.scale
        return match_template(composite, cutout, fitted_size(composite.size, cutout.size, scale))

    def _generated(self, request: GenerationRequest, span: ProgressSpan) -> Image.Image:
        result = self.context.generate(request, span)
        self.scheduler = result.scheduler
        image = result.images[0]
        return Image.frombytes("RGB", (image.width, image.height), image.rgb)

    def _fitted(self, image: Image.Image) -> Image.Image:
        """Return the stored image at the request's size, which it may have lost when a person changed it."""
        return fit(image, (self.request.width, self.request.height), self.inputs.fit)

    @contextmanager
    def _stage(self, phase: Phase) -> Iterator[None]:
        """Account the block's time to a stage; raise first where the job is not to go on."""
        self.context.raise_if_unwanted()
        with self.context.stage(phase):
            yield

    @property
    def _strength(self) -> float:
        """The job's `refine_strength`, raised so that at least one step is taken."""
        one_step = 1 / self.request.num_inference_steps + ROUNDING_MARGIN
        return min(1.0, max(self.inputs.product.refine_strength, one_step))

    @property
    def _refining_steps(self) -> int:
        return int(self.request.num_inference_steps * self._strength) if self.inputs.product.refine_strength > 0 else 0
