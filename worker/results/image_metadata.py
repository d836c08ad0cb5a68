"""What a picture's file says of itself: how a job was drawn, written into it as the settings will have it."""

import logging
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING

from config.images import PictureSettings
from config.logs import log_event
from inference.request import GenerationResult, Picture
from watermark.image_format import PictureFormat
from watermark.provenance.provenance import Prompts, Provenance, SourceType, packet_of, png_text
from watermark.signature import SignedPicture
from worker.messages.job import Job, Kind

if TYPE_CHECKING:
    from watermark.provenance.manifest import ManifestSigner

logger = logging.getLogger(__name__)

SOFTWARE = "Darkroom"
# Certificates are renewed by people.
MIN_DAYS_LEFT = 30
# A picture that somebody sent is part of all but the first.
SOURCE_TYPES = {
    Kind.TEXT2IMAGE: SourceType.GENERATED,
    Kind.IMAGE2IMAGE: SourceType.COMPOSITE,
    Kind.INPAINT: SourceType.COMPOSITE,
    Kind.PRODUCT: SourceType.COMPOSITE,
}


class ImageEncoder:
    """Makes the file of a signed picture. One for all jobs; any thread may call it."""

    def __init__(self, settings: PictureSettings) -> None:
        """Raises `SettingsError` for a certificate or a key that nobody can sign manifests with."""
        self._level = settings.embed_metadata
        self._signer = load_signer(settings)
        if self._signer is not None:
            days_left = self._signer.credentials.days_left
            level = logging.INFO if days_left >= MIN_DAYS_LEFT else logging.WARNING
            log_event(logger, "manifests are signed", level, days_left=days_left)

    def encode(
        self, picture: SignedPicture, provenance: Provenance, picture_format: PictureFormat = PictureFormat.PNG
    ) -> bytes:
        """The file, whole: nothing may be changed in it any more. Raises `ManifestNotSigned`.

        A JPEG has no place for PNG's text: it carries the XMP packet and the manifest.
        """
        told = provenance if self._level == "full" else replace(provenance, prompts=None)
        is_labelled = self._level != "none"
        if picture_format is PictureFormat.JPEG:
            content = picture.encode_jpeg(packet_of(told).encode() if is_labelled else b"")
        else:
            content = picture.encode_png(png_text(told) if is_labelled else None)
        return content if self._signer is None else self._signer.sign(content, told, picture_format)

    @property
    def refusal(self) -> str:
        """Why no picture can be labelled any more, or nothing."""
        if self._signer is None or datetime.now(UTC) <= self._signer.credentials.expires_at:
            return ""
        return f"the certificate of C2PA_CERTIFICATE expired on {self._signer.credentials.expires_at:%Y-%m-%d}"


def load_signer(settings: PictureSettings) -> "ManifestSigner | None":
    """The signer of C2PA manifests where a certificate is configured; raises `SettingsError`."""
    if settings.c2pa_certificate is None or settings.c2pa_private_key is None:
        return None
    # Some 20 MB of libraries, for those only who have a certificate.
    from watermark.provenance.credentials import read_credentials  # noqa: PLC0415
    from watermark.provenance.manifest import ManifestSigner  # noqa: PLC0415

    return ManifestSigner(read_credentials(settings.c2pa_certificate, settings.c2pa_private_key))


def provenance_of(job: Job, result: GenerationResult, picture: Picture, *, model: str) -> Provenance:
    """How `picture`, one of the result's, was made; now is taken for the time when."""
    return Provenance(
        software=SOFTWARE,
        version=_version(),
        model=model,
        created_at=datetime.now(UTC),
        kind=job.kind,
        source_type=SOURCE_TYPES[job.kind],
        task_id=job.task_id,
        seed=picture.seed,
        num_inference_steps=result.num_inference_steps,
        guidance_scale=result.guidance_scale,
        scheduler=result.scheduler,
        width=picture.width,
        height=picture.height,
        adapters=tuple(_name(adapter.ref.shown_key) for adapter in job.adapters),
        artist_name=job.artist_name,
        prompts=Prompts(job.prompt, job.negative_prompt),
    )


@cache
def _version() -> str:
    return version("darkroom")


def _name(key: str) -> str:
    """The last part of a key: what is before it may name customers."""
    return key.rstrip("/").rpartition("/")[2].removesuffix(".safetensors")
