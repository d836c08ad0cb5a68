"""Previews of running jobs as small JPEGs in the results bucket; a failed write is only logged."""

import logging
import threading
from collections import deque
from io import BytesIO
from typing import NamedTuple

from PIL import Image

from clients.storage.client import Storage
from clients.storage.errors import StorageError
from clients.storage.location import ObjectRef
from config.logs import log_event
from inference.request import Preview, StepReport
from worker.messages.generation_id import GenerationId
from worker.progress.latest_wins import LatestWins, Source

logger = logging.getLogger(__name__)

JPEG = "image/jpeg"
# The next preview has the same key.
CACHE_CONTROL = "no-store"
JPEG_QUALITY = 80
# Latents are an eighth of the image's size: a larger preview has no more detail.
LONGEST_SIDE_PIXELS = 256
MAX_ENLARGEMENT = 4
STORE_DEADLINE_SECONDS = 5.0
# Jobs that are over whose newest preview is kept: until they are signed, stored and told it is all there is to see, and
# a page that was told of it asks for it a moment later.
NUM_KEPT = 16


class ShownPreview(NamedTuple):
    """A job's newest preview, as the status page shows it, and its step."""

    step_index: int
    jpeg: bytes


class _Reported(NamedTuple):
    """A preview as the engine made it, and its step."""

    step_index: int
    preview: Preview


class JobPreviews(Source[_Reported]):
    """One job's previews. `on_step` runs on the engine's owner thread and only takes a lock.

    `url` is where they are stored, plain; None before the first is.
    """

    def __init__(self, previewer: "Previewer", task_id: str, ref: ObjectRef) -> None:
        super().__init__()
        self._previewer = previewer
        self.task_id = task_id
        self.ref = ref
        self.shown: ShownPreview | None = None
        self.url: str | None = None

    def on_step(self, report: StepReport) -> None:
        """Have the report's preview stored, if it has one, in place of one not stored yet."""
        if report.preview is not None:
            self._previewer.queue.offer(self, [_Reported(report.step_index, report.preview)])

    def current_url(self) -> str:
        """Return the address for readers, valid from now on. Raises `StorageError`."""
        return self._previewer.storage.result_url(self.ref)

    def close(self) -> None:
        """Drop what is not stored and wait for what is being stored.

        Nothing is written after this returns, unless the store takes longer than its deadline.
        """
        self._previewer.retire(self)


class Previewer:
    """Encodes and stores previews on a thread of their own, so that no denoising step waits for it."""

    def __init__(self, storage: Storage, bucket: str) -> None:
        self.storage = storage
        self._bucket = bucket
        self._lock = threading.Lock()
        self._by_task: dict[str, JobPreviews] = {}
        self._retired: deque[JobPreviews] = deque()
        self.queue = LatestWins[JobPreviews, _Reported]("previews", self._store, handle_seconds=STORE_DEADLINE_SECONDS)

    def start(self) -> None:
        """Start the thread."""
        self.queue.start()

    def close(self) -> None:
        """Drop what is not stored and end the thread."""
        self.queue.close()

    def follow(self, task_id: str, generation_id: GenerationId) -> JobPreviews:
        """Return the previews of a job that begins."""
        previews = JobPreviews(self, task_id, ObjectRef(self._bucket, f"previews/gen-{generation_id}.jpg"))
        with self._lock:
            self._by_task[task_id] = previews
        return previews

    def latest(self, task_id: str) -> ShownPreview | None:
        """Return the newest preview of a job that runs or was just over, stored or not."""
        with self._lock:
            previews = self._by_task.get(task_id)
        return previews.shown if previews else None

    def retire(self, previews: JobPreviews) -> None:
        """Wait for the job's preview being stored, and forget those of jobs that have long been over."""
        with self._lock:
            self._retired.append(previews)
            if len(self._retired) > NUM_KEPT:
                oldest = self._retired.popleft()
                if self._by_task.get(oldest.task_id) is oldest:
                    del self._by_task[oldest.task_id]
        self.queue.retire(previews)

    def _store(self, previews: JobPreviews, reported: _Reported) -> None:
        previews.shown = ShownPreview(reported.step_index, encode(reported.preview))
        try:
            self.storage.put(
                previews.ref,
                previews.shown.jpeg,
                content_type=JPEG,
                cache_control=CACHE_CONTROL,
                deadline_seconds=STORE_DEADLINE_SECONDS,
            )
        except StorageError as error:
            log_event(logger, "preview not stored", logging.WARNING, task_id=previews.task_id, reason=str(error))
        else:
            previews.url = self.storage.public_url(previews.ref)


def encode(preview: Preview) -> bytes:
    """Return the preview as a JPEG, enlarged where it is small."""
    size = (preview.width, preview.height)
    image = Image.frombytes("RGB", size, preview.rgb)
    factor = max(1, min(MAX_ENLARGEMENT, LONGEST_SIDE_PIXELS // max(size)))
    sink = BytesIO()
    enlarged = image.resize((factor * preview.width, factor * preview.height), Image.Resampling.BICUBIC)
    enlarged.save(sink, "JPEG", quality=JPEG_QUALITY)
    return sink.getvalue()
