"""How a product's picture is made: cut out, draw the background, compose, refine. What is kept is not made again."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from PIL import Image

from inference.request import GenerationRequest, GenerationResult, Picture, Source
from watermark.decoding import PictureMode
from watermark.geometry import Rect
from watermark.product.compositing import compose
from watermark.product.masks import product_mask, repaint_mask, restore_masked
from watermark.product.placement import fitted_size, place_product
from watermark.product.template_match import match_template
from watermark.resizing import fit
from worker.errors import JobFailed
from worker.jobs.engine_client import GeneratedImages, ProgressSpan
from worker.messages.job import JobProduct
from worker.product.cutter import Cutter
from worker.product.inputs import ProductInputs
from worker.product.stage_store import Kept, ProductStage
from worker.results.image_store import NO_METADATA

# Noted beside a background, for the try that finds it.
SCHEDULER = "scheduler"
# The engine rounds steps down, and a product of floats may lie below a whole number.
A_HAIR = 1e-6


class GenerationContext(Protocol):
    """Where a picture is made: in a job's run, or on a command line."""

    def draw(self, request: GenerationRequest, leg: ProgressSpan) -> GenerationResult:
        """Have the engine draw, as a leg of the whole way."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Account the block's time."""

    def raise_if_unwanted(self) -> None:
        """Raise where the picture is not wanted any more, or not here."""


class Stages(Protocol):
    """Where the stages' pictures are kept, if they are. See `Shelf`."""

    def find(self, stage: ProductStage, mode: PictureMode) -> Kept | None: ...

    def keep(self, stage: ProductStage, picture: Image.Image, notes: Mapping[str, str] = NO_METADATA) -> None: ...


@dataclass(slots=True)
class ProductComposer:
    """One job on its way through the stages. `request` is for its background, which has the picture's size;
    `scheduler` is of what was drawn last, `background_steps` are those that the background still takes."""

    workshop: GenerationContext
    stages: Stages
    cutter: Cutter
    request: GenerationRequest
    brought: ProductInputs
    scheduler: str
    background_steps: int = 0

    def drawn(self) -> GeneratedImages:
        """The picture without headline and signature, as the engine's result of a job that it draws alone, and where
        the product stands in it. Raises what breaks the job off."""
        picture, at = self._picture()
        drawn = Picture(picture.width, picture.height, picture.tobytes(), self.request.seeds[0])
        result = GenerationResult(
            (drawn,), self.scheduler, self.request.num_inference_steps, self.request.guidance_scale, stages=()
        )
        return GeneratedImages(result, () if at is None else (at,))

    def _picture(self) -> tuple[Image.Image, Rect | None]:
        """The picture, and where the product stands in it, where that is known."""
        cutout = self._cutout()
        composite, at = self._composite(cutout)
        if self._product.refine_strength == 0:
            return composite, at
        if at is None:
            raise JobFailed(
                "IMAGE_INVALID",
                "product.composite_path: the cut-out is not to be found in it at the size of layout.scale, so nothing"
                " could protect it: give the scale at which it stands there, or refine_strength 0",
            )
        return self._refined(composite, cutout, at), at

    def _cutout(self) -> Image.Image:
        if self.brought.cutout is not None:
            return self.brought.cutout
        with self._stage("cut"):
            kept = self.stages.find(ProductStage.CUTOUT, "RGBA")
            if kept is not None:
                return kept.picture
            assert self.brought.image is not None, "a job brings one or the other"  # noqa: S101
            cutout = self.cutter.cut(self.brought.image, "product.image_path", self.workshop.raise_if_unwanted)
            self.stages.keep(ProductStage.CUTOUT, cutout)
            return cutout

    def _composite(self, cutout: Image.Image) -> tuple[Image.Image, Rect | None]:
        """The composite, and where the product stands in it; None where a person put it elsewhere."""
        if self.brought.composite is not None:
            with self._stage("compose"):
                return self.brought.composite, self._place_in(self.brought.composite, cutout)
        background = self._background()
        with self._stage("compose"):
            kept = self.stages.find(ProductStage.COMPOSITE, "RGB")
            if kept is not None and kept.is_changed:
                composite = self._fitted(kept.picture)
                return composite, self._place_in(composite, cutout)
            at = place_product(background, cutout.size, self._product.layout)
            if kept is not None:
                return self._fitted(kept.picture), at
            composite = compose(background, cutout, at, shadow=self._product.shadow)
            self.stages.keep(ProductStage.COMPOSITE, composite)
            return composite, at

    def _background(self) -> Image.Image:
        if self.brought.background is not None:
            return self.brought.background
        with self._stage("fetch"):
            kept = self.stages.find(ProductStage.BACKGROUND, "RGB")
        if kept is not None:
            self.scheduler = kept.notes.get(SCHEDULER, self.scheduler)
            return self._fitted(kept.picture)
        self.background_steps = self.request.num_inference_steps
        background = self._drawn(self.request, ProgressSpan(0, self.background_steps, self._num_steps))
        with self.workshop.stage("store"):
            self.stages.keep(ProductStage.BACKGROUND, background, {SCHEDULER: self.scheduler})
        return background

    def _refined(self, composite: Image.Image, cutout: Image.Image, at: Rect) -> Image.Image:
        with self._stage("fetch"):
            kept = self.stages.find(ProductStage.REFINED, "RGB")
        if kept is not None:
            return self._fitted(kept.picture)
        mask = product_mask(composite.size, cutout, at)
        request = replace(
            self.request,
            request_id=f"{self.request.request_id}:refine",
            source=Source(composite.tobytes(), self._strength, repaint_mask(mask).tobytes()),
        )
        refined = self._drawn(request, ProgressSpan(self.background_steps, self._refining_steps, self._num_steps))
        with self.workshop.stage("compose"):
            refined = restore_masked(refined, composite, mask)
            self.stages.keep(ProductStage.REFINED, refined)
            return refined

    def _place_in(self, composite: Image.Image, cutout: Image.Image) -> Rect | None:
        """Where the product stands in a composite that a person made or changed."""
        return match_template(composite, cutout, fitted_size(composite.size, cutout.size, self._product.layout.scale))

    def _drawn(self, request: GenerationRequest, leg: ProgressSpan) -> Image.Image:
        result = self.workshop.draw(request, leg)
        self.scheduler = result.scheduler
        drawn = result.pictures[0]
        return Image.frombytes("RGB", (drawn.width, drawn.height), drawn.rgb)

    def _fitted(self, picture: Image.Image) -> Image.Image:
        """What was kept, of another size where somebody changed it."""
        return fit(picture, (self.request.width, self.request.height), self.brought.fit)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Account the block's time to stage `name`, unless the job is to go no further."""
        self.workshop.raise_if_unwanted()
        with self.workshop.stage(name):
            yield

    @property
    def _product(self) -> JobProduct:
        return self.brought.product

    @property
    def _strength(self) -> float:
        """As asked for, but of few steps at least one is taken."""
        return min(1.0, max(self._product.refine_strength, 1 / self.request.num_inference_steps + A_HAIR))

    @property
    def _refining_steps(self) -> int:
        return int(self.request.num_inference_steps * self._strength) if self._product.refine_strength > 0 else 0

    @property
    def _num_steps(self) -> int:
        return self.background_steps + self._refining_steps
