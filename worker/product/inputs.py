"""What a product job brings, fetched and checked before anything is made."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

from PIL import Image

from clients.storage.location import ObjectRef
from watermark.decoding import PictureMode
from watermark.product.cutout import CutoutFailed, has_transparency, limit_size, trim
from watermark.resizing import Fit, fit
from worker.errors import JobFailed
from worker.jobs.inputs.references import References
from worker.messages.job import JobProduct
from worker.product.stage_store import ProductStage, StageStore

# The picture at a place that a field of the message names, in a mode.
Read = Callable[[ObjectRef, str, PictureMode], Image.Image]


@dataclass(frozen=True, slots=True)
class ProductInputs:
    """Decoded pictures: of the product itself and its cut-out RGBA, of the rest RGB, and of any size.

    `fit` says how background and composite come to the drawing's size, `proportions` is the size of that of the two
    which is used, as it came.
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
        """What the drawing takes its proportions from, where the job names no size."""
        return References(original=self.proportions)

    def note(self, shelf: StageStore) -> None:
        """List what need not be made."""
        product = self.product
        for stage, ref in (
            (ProductStage.CUTOUT, product.cutout_ref),
            (ProductStage.BACKGROUND, product.background_ref),
            (ProductStage.COMPOSITE, product.composite_ref),
        ):
            if ref is not None:
                shelf.note_brought(stage, ref)

    def at(self, size: tuple[int, int]) -> Self:
        """The same with background and composite at the drawing's size."""
        background, composite = (
            None if picture is None else fit(picture, size, self.fit) for picture in (self.background, self.composite)
        )
        return replace(self, background=background, composite=composite)


def load_inputs(product: JobProduct, how: Fit, read: Read) -> ProductInputs:
    """All that the job names for its stages. Raises `JobFailed` that names the field, and what `read` raises."""

    def picture(field: str, mode: PictureMode) -> Image.Image | None:
        ref = {
            "image_path": None if product.cutout_ref else product.image_ref,
            "cutout_path": product.cutout_ref,
            "background_image_path": None if product.composite_ref else product.background_ref,
            "composite_path": product.composite_ref,
        }[field]
        return None if ref is None else read(ref, f"product.{field}", mode)

    image, cutout = picture("image_path", "RGBA"), picture("cutout_path", "RGBA")
    image, cutout = None if image is None else limit_size(image), None if cutout is None else _cut(cutout)
    background, composite = picture("background_image_path", "RGB"), picture("composite_path", "RGB")
    used = composite or background
    return ProductInputs(product, how, image, cutout, background, composite, proportions=used.size if used else None)


def _cut(cutout: Image.Image) -> Image.Image:
    field = "product.cutout_path"
    if not has_transparency(cutout):
        raise JobFailed("IMAGE_INVALID", f"{field} has no transparent part: nothing is cut out; send it as image_path")
    try:
        return trim(cutout)
    except CutoutFailed as error:
        raise JobFailed("IMAGE_INVALID", f"{field}: {error}") from error
