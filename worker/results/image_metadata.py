"""The metadata written into an image file: provenance and manifest, as the settings select."""

import logging
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from config.images import ImageSettings
from config.logs import log_event
from inference.request import GenerationResult, RawImage
from watermark.image_format import ImageFormat
from watermark.provenance.provenance import Prompts, Provenance, SourceType, build_png_text, build_xmp
from watermark.signature import SignedImage
from worker.messages.job import Job, Kind
from worker.version import darkroom_version

if TYPE_CHECKING:
    from watermark.provenance.c2pa import ManifestSigner

logger = logging.getLogger(__name__)


SOFTWARE = "Darkroom"
# Operators renew certificates.
MIN_DAYS_LEFT = 30
# All but the first contain an image from the customer.
SOURCE_TYPES = {
    Kind.TEXT2IMAGE: SourceType.GENERATED,
    Kind.IMAGE2IMAGE: SourceType.COMPOSITE,
    Kind.INPAINT: SourceType.COMPOSITE,
    Kind.PRODUCT: SourceType.COMPOSITE,
    Kind.EDIT: SourceType.COMPOSITE,
}


class ImageEncoder:
    """Encodes signed images as files. Thread-safe."""

    def __init__(self, settings: ImageSettings) -> None:
        """Create an encoder; raise `SettingsError` for a certificate or a key that cannot sign manifests."""
        self._level = settings.embed_metadata
        self._signer = load_signer(settings)
        if self._signer is not None:
            days_left = self._signer.credentials.days_left
            level = logging.INFO if days_left >= MIN_DAYS_LEFT else logging.WARNING
            log_event(logger, "manifests are signed", level, days_left=days_left)

    def encode(self, image: SignedImage, provenance: Provenance, image_format: ImageFormat = ImageFormat.PNG) -> bytes:
        """Return the complete file, whose bytes must not change after signing. Raises `ManifestNotSigned`.

        A JPEG has no text chunks like PNG: it contains the XMP packet and the manifest.
        """
        shown = provenance if self._level == "full" else replace(provenance, prompts=None)
        is_labelled = self._level != "none"
        if image_format is ImageFormat.JPEG:
            content = image.encode_jpeg(build_xmp(shown).encode() if is_labelled else b"")
        else:
            content = image.encode_png(build_png_text(shown) if is_labelled else None)
        return content if self._signer is None else self._signer.sign(content, shown, image_format)

    @property
    def refusal(self) -> str:
        """Why no image can be signed any more; empty where it can."""
        if self._signer is None or datetime.now(UTC) <= self._signer.credentials.expires_at:
            return ""
        return f"the certificate of C2PA_CERTIFICATE expired on {self._signer.credentials.expires_at:%Y-%m-%d}"


def load_signer(settings: ImageSettings) -> "ManifestSigner | None":
    """Return the signer of C2PA manifests where a certificate is configured; raise `SettingsError` for a bad one."""
    if settings.c2pa_certificate is None or settings.c2pa_private_key is None:
        return None
    # Some 20 MB of libraries, loaded only where a certificate is configured.
    from watermark.provenance.c2pa import ManifestSigner  # noqa: PLC0415
    from watermark.provenance.credentials import read_credentials  # noqa: PLC0415

    return ManifestSigner(read_credentials(settings.c2pa_certificate, settings.c2pa_private_key))


def provenance_of(job: Job, result: GenerationResult, image: RawImage, *, model: str) -> Provenance:
    """Return the provenance of `image`, one of the result's, created now."""
    keys = [adapter.ref.shown_key for adapter in job.adapters]
    return Provenance(
        software=SOFTWARE,
        version=darkroom_version(),
        model=model,
        created_at=datetime.now(UTC),
        kind=job.kind,
        source_type=SOURCE_TYPES[job.kind],
        task_id=job.task_id,
        seed=image.seed,
        num_inference_steps=result.num_inference_steps,
        guidance_scale=result.guidance_scale,
        guidance_rescale=result.guidance_rescale,
        scheduler=result.scheduler,
        width=image.width,
        height=image.height,
        # The last part of each key: the parts before may name customers.
        adapters=tuple(key.rstrip("/").rpartition("/")[2].removesuffix(".safetensors") for key in keys),
        artist_name=job.artist_name,
        prompts=Prompts(job.prompt, job.negative_prompt),
    )
