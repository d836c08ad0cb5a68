"""From a drawn picture to a signed one: what was to be kept is put back, headlines and the signature are put on."""

from collections.abc import Callable

from PIL import Image

from inference.request import Picture
from watermark.geometry import Rect
from watermark.product.masks import restore_masked
from watermark.signature import Signature, SignedPicture, sign, signature_rect
from watermark.text.headline import Headline, draw_headlines
from worker.jobs.inputs.references import References, mask_at
from worker.messages.job import Job

BLACK_FOR_WHITE = [255 - value for value in range(256)]


def finish(
    drawn: Picture,
    job: Job,
    references: References,
    *,
    headlines: tuple[Headline, ...],
    signature: Signature,
    keep_off: tuple[Rect, ...] = (),
    on_headlines: Callable[[Image.Image], None] = lambda picture: None,
) -> SignedPicture:
    """The picture as it is stored. Headlines without a place of their own keep off the parts of it in `keep_off`, and
    off the signature. `on_headlines` is shown the one with headlines, where the job has any, unsigned."""
    picture = _kept(Image.frombytes("RGB", (drawn.width, drawn.height), drawn.rgb), job, references)
    if headlines:
        place = signature_rect(picture.size, signature, job.signature_style)
        picture = draw_headlines(picture, headlines, avoid=keep_off if place is None else (*keep_off, place))
        on_headlines(picture)
    return sign(picture, signature, job.signature_style)


def _kept(picture: Image.Image, job: Job, references: References) -> Image.Image:
    """What a mask keeps comes back to the byte, which no model gives it."""
    if references.mask is None or references.init is None:
        return picture
    kept = mask_at(references.mask, picture.size, job.fit).point(BLACK_FOR_WHITE)
    return restore_masked(picture, references.init_at(picture.size, job.fit), kept)
