"""Postprocessing: masked-out parts are restored, headlines and the signature are drawn."""

from collections.abc import Callable

from PIL import Image

from inference.request import RawImage
from watermark.geometry import Rect
from watermark.product.masks import restore_masked
from watermark.resizing import fit
from watermark.signature import Signature, SignedImage, sign, signature_rect
from watermark.text.headline import Headline, draw_headlines
from worker.jobs.inputs.references import References, mask_at
from worker.messages.job import Job

BLACK_FOR_WHITE = [255 - value for value in range(256)]


def postprocess(
    generated: RawImage,
    job: Job,
    references: References,
    *,
    headlines: tuple[Headline, ...],
    signature: Signature,
    keep_off: tuple[Rect, ...] = (),
    on_headlines: Callable[[Image.Image], None] = lambda image: None,
) -> SignedImage:
    """Return the image as it is stored. Headlines without a position avoid the rectangles of `keep_off` and the
    signature. `on_headlines` gets the unsigned image with headlines, where the job has any."""
    image = Image.frombytes("RGB", (generated.width, generated.height), generated.rgb)
    if references.mask is not None and references.init is not None:
        # Byte for byte, which no model reproduces.
        kept = mask_at(references.mask, image.size, job.fit).point(BLACK_FOR_WHITE)
        image = restore_masked(image, fit(references.init, image.size, job.fit), kept)
    if headlines:
        place = signature_rect(image.size, signature, job.signature_style)
        image = draw_headlines(image, headlines, avoid=keep_off if place is None else (*keep_off, place))
        on_headlines(image)
    return sign(image, signature, job.signature_style)
