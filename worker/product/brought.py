"""What a product job brings, fetched and checked before anything is made."""

from dataclasses import dataclass

from PIL import Image

from watermark.decoding import PictureMode
from watermark.fitting import fit
from worker.fetching import Fetcher
from worker.job import Job, JobProduct
from worker.product.cutout import NothingCut, bounded, has_own_alpha, trimmed
from worker.product.shelf import Shelf, Stage
from worker.references import References
from worker.settling import JobFailed


@dataclass(frozen=True, slots=True)
class Brought:
    """Decoded pictures: of the product itself and its cut-out RGBA, of the rest RGB, and of any size."""

    product: JobProduct
    image: Image.Image | None
    cutout: Image.Image | None
    background: Image.Image | None
    composite: Image.Image | None

    @property
    def references(self) -> References:
        """What the drawing takes its proportions from, where the job names no size."""
        return References(init=self.composite or self.background)

    def note(self, shelf: Shelf) -> None:
        """List what need not be made."""
        product = self.product
        for stage, ref in (
            (Stage.CUTOUT, product.cutout_ref),
            (Stage.BACKGROUND, product.background_ref),
            (Stage.COMPOSITE, product.composite_ref),
        ):
            if ref is not None:
                shelf.note_brought(stage, ref)

    def fitted(self, job: Job, size: tuple[int, int]) -> "Brought":
        """Background and composite at the drawing's size."""
        background, composite = (
            None if picture is None else fit(picture, size, job.fit) for picture in (self.background, self.composite)
        )
        return Brought(self.product, self.image, self.cutout, background, composite)


def fetch(product: JobProduct, fetcher: Fetcher) -> Brought:
    """All that the job names for its stages. Raises `JobFailed` that names the field."""

    def picture(field: str, mode: PictureMode) -> Image.Image | None:
        ref = {
            "image_path": None if product.cutout_ref else product.image_ref,
            "cutout_path": product.cutout_ref,
            "background_image_path": None if product.composite_ref else product.background_ref,
            "composite_path": product.composite_ref,
        }[field]
        return None if ref is None else fetcher.picture(ref, f"product.{field}", mode)

    image, cutout = picture("image_path", "RGBA"), picture("cutout_path", "RGBA")
    return Brought(
        product,
        None if image is None else bounded(image),
        None if cutout is None else _cut(cutout),
        picture("background_image_path", "RGB"),
        picture("composite_path", "RGB"),
    )


def _cut(cutout: Image.Image) -> Image.Image:
    field = "product.cutout_path"
    if not has_own_alpha(cutout):
        raise JobFailed("IMAGE_INVALID", f"{field} has no transparent part: nothing is cut out; send it as image_path")
    try:
        return trimmed(cutout)
    except NothingCut as error:
        raise JobFailed("IMAGE_INVALID", f"{field}: {error}") from error
