"""A product job's pictures, stage by stage, in the private bucket: to be corrected, and to go on from."""

import hashlib
import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from PIL import Image

from clients.storage.client import Storage
from clients.storage.errors import ObjectNotFound, ObjectTooLarge
from clients.storage.location import ObjectRef
from config.logs import log_event
from watermark.decoding import PictureMode, decode_picture
from watermark.errors import PictureInvalid, PictureTooLarge
from watermark.signature import PNG_COMPRESS_LEVEL, PNG_COMPRESS_TYPE
from worker.breakers import StoreGate
from worker.messages.job import Job
from worker.results.image_store import NO_METADATA, SHA256, TASK_ID, ImageStore

logger = logging.getLogger(__name__)

MAX_STAGE_BYTES = 50_000_000


class ProductStage(StrEnum):
    """The stages in their order, as their objects are called."""

    CUTOUT = "cutout"
    BACKGROUND = "background"
    COMPOSITE = "composite"
    REFINED = "refined"
    HEADLINE = "headline"
    FINAL = "final"


@dataclass(frozen=True, slots=True)
class Kept:
    """A stage's picture of an earlier try, and what was noted beside it. `is_changed`: somebody did that since."""

    picture: Image.Image
    notes: Mapping[str, str]
    is_changed: bool


@dataclass(slots=True)
class StageStore:
    """One job's stages; its thread owns it. None of them is signed, so they never go into a results bucket.

    A task that is tried again finds what it kept, up to the first stage that is missing or that somebody changed: the
    change counts, and what was made from the picture before it is made again. Of another task nothing is used.
    """

    store: ImageStore
    bucket: str
    job: Job
    listing: dict[str, str] = field(default_factory=dict)
    _is_resuming: bool = False
    _is_over: bool = False

    def find(self, stage: ProductStage, mode: PictureMode) -> Kept | None:
        """The stage's picture, as this task kept it or somebody changed it since; None where it has to be made."""
        kept = None if self._is_over else self._kept(stage, mode)
        self._is_over = kept is None or kept.is_changed
        if kept is not None:
            self._is_resuming = True
            self.listing[stage] = self._ref(stage).uri
            log_event(logger, "stage resumed", stage=stage.value, is_changed=kept.is_changed)
        return kept

    def keep(self, stage: ProductStage, picture: Image.Image, notes: Mapping[str, str] = NO_METADATA) -> None:
        """Store the stage's picture, RGB or RGBA."""
        content = io.BytesIO()
        picture.save(content, "PNG", compress_level=PNG_COMPRESS_LEVEL, compress_type=PNG_COMPRESS_TYPE)
        self.save_png(stage, content.getvalue(), notes)

    def save_png(self, stage: ProductStage, png: bytes, notes: Mapping[str, str] = NO_METADATA) -> None:
        """Store the stage's picture as it is."""
        ref = self._ref(stage)
        self.store.put(ref, png, task_id=self.job.task_id, metadata={**notes, "stage": stage.value})
        self.listing[stage] = ref.uri

    def note_brought(self, stage: ProductStage, ref: ObjectRef) -> None:
        """The job brought the stage's picture, which stays where it is."""
        self.listing[stage] = ref.uri

    def _ref(self, stage: ProductStage) -> ObjectRef:
        return ObjectRef(self.bucket, f"stages/gen-{self.job.generation_id}/{stage}.png")

    def _kept(self, stage: ProductStage, mode: PictureMode) -> Kept | None:
        ref = self._ref(stage)
        try:
            notes = self._gate.insist(lambda: self._storage.read_metadata(ref)).metadata
            # Who changes an object with the usual tools takes its notes off it.
            if not (notes.get(TASK_ID) == self.job.task_id or (self._is_resuming and TASK_ID not in notes)):
                return None
            content = self._gate.insist(lambda: self._storage.read(ref, max_bytes=MAX_STAGE_BYTES))
            picture = decode_picture(content, mode)
        except ObjectNotFound:
            return None
        except (ObjectTooLarge, PictureInvalid, PictureTooLarge) as error:
            log_event(logger, "stage made again", logging.WARNING, stage=stage.value, reason=str(error))
            return None
        return Kept(picture, notes, is_changed=hashlib.sha256(content).hexdigest() != notes.get(SHA256))

    @property
    def _storage(self) -> Storage:
        return self.store.storage

    @property
    def _gate(self) -> StoreGate:
        return self.store.gate
