"""Storage of a product job's stages in the private bucket, where people can correct them and a retry resumes."""

import hashlib
import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from PIL import Image

from clients.storage.errors import ObjectNotFound, ObjectTooLarge
from clients.storage.location import ObjectRef
from config.logs import log_event
from watermark.decoding import ImageMode, decode_image
from watermark.errors import ImageInvalid, ImageTooLarge
from watermark.signature import PNG_COMPRESS_LEVEL, PNG_COMPRESS_TYPE
from worker.messages.job import Job
from worker.results.image_store import NO_METADATA, SHA256, TASK_ID, ImageStore

logger = logging.getLogger(__name__)

MAX_STAGE_BYTES = 50_000_000


class ProductStage(StrEnum):
    """The stages in their order, by the names of their objects."""

    CUTOUT = "cutout"
    BACKGROUND = "background"
    COMPOSITE = "composite"
    REFINED = "refined"
    HEADLINE = "headline"
    FINAL = "final"


@dataclass(frozen=True, slots=True)
class StoredStage:
    """A stage's image of an earlier attempt, and its metadata. `is_changed`: a person has changed it since."""

    image: Image.Image
    metadata: Mapping[str, str]
    is_changed: bool


@dataclass(slots=True)
class StageStore:
    """The stages of one job; its thread owns it. None of them is signed, so they never go into a results bucket.

    A retried task resumes from its own stages, up to the first one that is missing or was changed by a person: the
    change counts, and the later stages are made again. Another task's stages are not used. `uris` lists what the job
    brought and what is stored.
    """

    store: ImageStore
    bucket: str
    job: Job
    uris: dict[str, str] = field(default_factory=dict)
    _is_resuming: bool = False
    _is_past_gap: bool = False

    def find(self, stage: ProductStage, mode: ImageMode) -> StoredStage | None:
        """Return the stage's image as this task stored it or a person changed it; None where it has to be made."""
        stored = None if self._is_past_gap else self._load(stage, mode)
        self._is_past_gap = stored is None or stored.is_changed
        if stored is not None:
            self._is_resuming = True
            self.uris[stage] = self._ref(stage).uri
            log_event(logger, "stage resumed", stage=stage.value, is_changed=stored.is_changed)
        return stored

    def save(self, stage: ProductStage, image: Image.Image, metadata: Mapping[str, str] = NO_METADATA) -> None:
        """Encode and store the stage's image, RGB or RGBA."""
        content = io.BytesIO()
        image.save(content, "PNG", compress_level=PNG_COMPRESS_LEVEL, compress_type=PNG_COMPRESS_TYPE)
        self.save_png(stage, content.getvalue(), metadata)

    def save_png(self, stage: ProductStage, png: bytes, metadata: Mapping[str, str] = NO_METADATA) -> None:
        """Store the stage's PNG."""
        ref = self._ref(stage)
        self.store.put(ref, png, task_id=self.job.task_id, metadata={**metadata, "stage": stage.value})
        self.uris[stage] = ref.uri

    def _ref(self, stage: ProductStage) -> ObjectRef:
        return ObjectRef(self.bucket, f"stages/gen-{self.job.generation_id}/{stage}.png")

    def _load(self, stage: ProductStage, mode: ImageMode) -> StoredStage | None:
        ref, gate, storage = self._ref(stage), self.store.gate, self.store.storage
        try:
            metadata = gate.retry_while_denied(lambda: storage.read_metadata(ref)).metadata
            # The usual tools drop an object's metadata when they change it.
            if not (metadata.get(TASK_ID) == self.job.task_id or (self._is_resuming and TASK_ID not in metadata)):
                return None
            content = gate.retry_while_denied(lambda: storage.read(ref, max_bytes=MAX_STAGE_BYTES))
            image = decode_image(content, mode)
        except ObjectNotFound:
            return None
        except (ObjectTooLarge, ImageInvalid, ImageTooLarge) as error:
            log_event(logger, "stage made again", logging.WARNING, stage=stage.value, reason=str(error))
            return None
        return StoredStage(image, metadata, is_changed=hashlib.sha256(content).hexdigest() != metadata.get(SHA256))
