"""A product job's story: cut out, draw the background, compose, refine. What an earlier try kept is not made again."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from PIL import Image

from inference.request import GenerationRequest, GenerationResult, Picture, Source
from watermark.calm import Rect
from watermark.fitting import fit
from worker.drawing import Drawer, Drawn, Leg
from worker.fetching import Fetcher
from worker.job import Job, JobProduct
from worker.product.brought import Brought, fetch
from worker.product.compositing import compose
from worker.product.cutting import Cutter
from worker.product.finding import find
from worker.product.placing import place, size_in
from worker.product.protecting import around, product_mask, put_back
from worker.product.shelf import Shelf, Stage
from worker.progress import Track
from worker.runs import Run
from worker.settling import JobFailed
from worker.storing import PictureStore

# Noted beside a background, for the try that finds it.
SCHEDULER = "scheduler"
# The engine rounds steps down, and a product of floats may lie below a whole number.
A_HAIR = 1e-6


@dataclass(frozen=True, slots=True)
class ProductTeller:
    """Everything that product jobs need; one for all of them. Its methods block, on the job's own thread."""

    fetcher: Fetcher
    drawer: Drawer
    store: PictureStore
    cutter: Cutter
    private_bucket: str

    def fetch(self, job: Job) -> Brought | None:
        """What a product job brings; None for a job of another kind."""
        return None if job.product is None else fetch(job.product, self.fetcher)

    def shelf(self, job: Job) -> Shelf:
        """Where the job's stages are kept."""
        return Shelf(self.store, self.private_bucket, job)

    def make(self, run: Run, brought: Brought, request: GenerationRequest, track: Track, shelf: Shelf) -> Drawn:
        """The picture without headline and signature, as the engine's result of a job that it draws alone, and where
        the product stands in it.

        `request` is for the background: its size is the picture's. Raises what breaks the job off.
        """
        brought.note(shelf)
        fitted = brought.fitted(shelf.job, (request.width, request.height))
        telling = _Telling(self, run, shelf, request, track, fitted, request.scheduler or "")
        picture, at = telling.picture()
        drawn = Picture(picture.width, picture.height, picture.tobytes(), request.seeds[0])
        result = GenerationResult(
            (drawn,), telling.scheduler, request.num_inference_steps, request.guidance_scale, stages=()
        )
        return Drawn(result, () if at is None else (at,))


@dataclass(slots=True)
class _Telling:
    """One job on its way through the stages. `background_steps` are those that its background still takes."""

    teller: ProductTeller
    run: Run
    shelf: Shelf
    request: GenerationRequest
    track: Track
    brought: Brought
    scheduler: str
    background_steps: int = 0

    def picture(self) -> tuple[Image.Image, Rect | None]:
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
            kept = self.shelf.find(Stage.CUTOUT, "RGBA")
            if kept is not None:
                return kept.picture
            assert self.brought.image is not None, "a job brings one or the other"  # noqa: S101
            cutout = self.teller.cutter.cut(self.brought.image, "product.image_path", self._go_on_or_leave)
            self.shelf.keep(Stage.CUTOUT, cutout)
            return cutout

    def _composite(self, cutout: Image.Image) -> tuple[Image.Image, Rect | None]:
        """The composite, and where the product stands in it; None where a person put it elsewhere."""
        if self.brought.composite is not None:
            with self._stage("compose"):
                return self.brought.composite, self._place_in(self.brought.composite, cutout)
        background = self._background()
        with self._stage("compose"):
            kept = self.shelf.find(Stage.COMPOSITE, "RGB")
            if kept is not None and kept.is_changed:
                composite = self._fitted(kept.picture)
                return composite, self._place_in(composite, cutout)
            at = place(background, cutout.size, self._product.layout)
            if kept is not None:
                return kept.picture, at
            composite = compose(background, cutout, at, shadow=self._product.shadow)
            self.shelf.keep(Stage.COMPOSITE, composite)
            return composite, at

    def _background(self) -> Image.Image:
        if self.brought.background is not None:
            return self.brought.background
        with self._stage("fetch"):
            kept = self.shelf.find(Stage.BACKGROUND, "RGB")
        if kept is not None:
            self.scheduler = kept.notes.get(SCHEDULER, self.scheduler)
            return self._fitted(kept.picture)
        self.background_steps = self.request.num_inference_steps
        background = self._drawn(self.request, Leg(0, self.background_steps, self._num_steps))
        with self.run.stage("store"):
            self.shelf.keep(Stage.BACKGROUND, background, {SCHEDULER: self.scheduler})
        return background

    def _refined(self, composite: Image.Image, cutout: Image.Image, at: Rect) -> Image.Image:
        with self._stage("fetch"):
            kept = self.shelf.find(Stage.REFINED, "RGB")
        if kept is not None:
            return self._fitted(kept.picture)
        mask = product_mask(composite.size, cutout, at)
        request = replace(
            self.request,
            request_id=f"{self.request.request_id}:refine",
            source=Source(composite.tobytes(), self._strength, around(mask).tobytes()),
        )
        refined = self._drawn(request, Leg(self.background_steps, self._refining_steps, self._num_steps))
        with self.run.stage("compose"):
            refined = put_back(refined, composite, mask)
            self.shelf.keep(Stage.REFINED, refined)
            return refined

    def _place_in(self, composite: Image.Image, cutout: Image.Image) -> Rect | None:
        """Where the product stands in a composite that a person made or changed."""
        return find(composite, cutout, size_in(composite.size, cutout.size, self._product.layout.scale))

    def _drawn(self, request: GenerationRequest, leg: Leg) -> Image.Image:
        result = self.teller.drawer.draw(self.run, request, self.track, leg)
        self.scheduler = result.scheduler
        drawn = result.pictures[0]
        return Image.frombytes("RGB", (drawn.width, drawn.height), drawn.rgb)

    def _fitted(self, picture: Image.Image) -> Image.Image:
        """What was kept, of another size where somebody changed it."""
        return fit(picture, (self.request.width, self.request.height), self.shelf.job.fit)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Account the block's time to stage `name`, unless the job is to go no further."""
        self._go_on_or_leave()
        with self.run.stage(name):
            yield

    def _go_on_or_leave(self) -> None:
        self.teller.drawer.go_on_or_leave(self.run)

    @property
    def _product(self) -> JobProduct:
        return self.brought.product

    @property
    def _strength(self) -> float:
        """As asked for, but of few steps at least one is taken."""
        return max(self._product.refine_strength, 1 / self.request.num_inference_steps + A_HAIR)

    @property
    def _refining_steps(self) -> int:
        return int(self.request.num_inference_steps * self._strength) if self._product.refine_strength > 0 else 0

    @property
    def _num_steps(self) -> int:
        return self.background_steps + self._refining_steps
