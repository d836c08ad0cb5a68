"""Inputs of a product job: its own images, loaded and checked before anything is generated."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

from PIL import Image

from clients.storage.location import ObjectRef
from watermark.decoding import ImageMode
from watermark.product.cutout import CutoutFailed, has_transparency, limit_size, trim
from watermark.resizing import Fit, fit
from worker.errors import ErrorCode, JobFailed
from worker.jobs.inputs.references import References
from worker.messages.job import JobProduct
from worker.product.stage_store import ProductStage, StageStore

# Returns the image at a location, in a mode; errors name the field of the message that the location is from.
ReadImage = Callable[[ObjectRef, str, ImageMode], Image.Image]


@dataclass(frozen=True, slots=True)
class ProductInputs:
    """Decoded images of any size: the product and its cut-out in RGBA, the others in RGB.

    `fit` says how background and composite are resized; `proportions` is the original size of the one of the two that
    is used.
    """

    product: JobProduct
    fit: Fit
    image: Image.Image | None
    cutout: Image.Image | None
    background: Image.Image | None
    composite: Image.Image | None
    proportions: tuple[int, int] | None

    @property
    def references(self) -> References:
        """References that only set the image's proportions, where the job names no size."""
        return References(original=self.proportions)

    def list_in(self, stage_store: StageStore) -> None:
        """List the stages that the job brings, whose images are not copied."""
        product = self.product
        for stage, ref in (
            (ProductStage.CUTOUT, product.cutout_ref),
            (ProductStage.BACKGROUND, product.background_ref),
            (ProductStage.COMPOSITE, product.composite_ref),
        ):
            if ref is not None:
                stage_store.uris[stage] = ref.uri

    def at(self, size: tuple[int, int]) -> Self:
        """Return a copy with background and composite resized to `size`."""
        background, composite = (
            None if image is None else fit(image, size, self.fit) for image in (self.background, self.composite)
        )
        return replace(self, background=background, composite=composite)


def load_inputs(product: JobProduct, how: Fit, read: ReadImage) -> ProductInputs:
    """Read all images that the job names. Raises `JobFailed` that names the field, and what `read` raises."""

    def image_in(field: str, mode: ImageMode) -> Image.Image | None:
        ref = {
            "image_path": None if product.cutout_ref else product.image_ref,
            "cutout_path": product.cutout_ref,
            "background_image_path": None if product.composite_ref else product.background_ref,
            "composite_path": product.composite_ref,
        }[field]
        return None if ref is None else read(ref, f"product.{field}", mode)

    image, cutout = image_in("image_path", "RGBA"), image_in("cutout_path", "RGBA")
    if image is not None:
        image = limit_size(image)
    if cutout is not None:
        if not has_transparency(cutout):
            reason = "product.cutout_path has no transparent part: nothing is cut out; send it as image_path"
            raise JobFailed(ErrorCode.IMAGE_INVALID, reason)
        try:
            cutout = trim(cutout)
        except CutoutFailed as error:
            raise JobFailed(ErrorCode.IMAGE_INVALID, f"product.cutout_path: {error}") from error
    background, composite = image_in("background_image_path", "RGB"), image_in("composite_path", "RGB")
    used = composite or background
    return ProductInputs(product, how, image, cutout, background, composite, proportions=used.size if used else None)
