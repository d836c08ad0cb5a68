"""Previews of running jobs as small JPEGs in the results bucket: the newest wins, a failure costs a log line."""

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

logger = logging.getLogger(__name__)

JPEG = "image/jpeg"
# The next preview has the same key.
CACHE_CONTROL = "no-store"
JPEG_QUALITY = 80
# Latents are an eighth of the picture; larger than this the preview shows no more.
LONGEST_SIDE_PIXELS = 256
MAX_ENLARGEMENT = 4
STORE_DEADLINE_SECONDS = 5.0
CLOSE_SECONDS = 2.0


class ShownPreview(NamedTuple):
    """A job's newest preview, as the status page shows it, and the step it was reported with."""

    step_index: int
    jpeg: bytes


class _Reported(NamedTuple):
    """A preview as the engine made it, and the step it was reported with."""

    step_index: int
    preview: Preview


class PreviewTrack:
    """One job's previews. `on_step` runs on the engine's owner thread and only ever takes a lock for a moment.

    `url` is where they are stored, None until the first one is.
    """

    def __init__(self, previewer: "Previewer", task_id: str, ref: ObjectRef) -> None:
        self._previewer = previewer
        self.task_id = task_id
        self.ref = ref
        self.pending: _Reported | None = None
        self.shown: ShownPreview | None = None
        self.url: str | None = None
        self.is_storing = False
        self.is_closed = False

    def on_step(self, report: StepReport) -> None:
        if report.preview is not None:
            self._previewer.offer(self, _Reported(report.step_index, report.preview))

    def close(self) -> None:
        """Drop what is not stored and wait for what is being stored: nothing is written after this returns, unless the
        store takes longer than its deadline."""
        self._previewer.retire(self)


class Previewer:
    """Owner of the thread that encodes and stores previews, so that neither a slow store nor an encoding is waited for
    where steps are counted."""

    def __init__(self, storage: Storage, bucket: str) -> None:
        self._storage = storage
        self._bucket = bucket
        self._changed = threading.Condition()
        self._tracks: dict[str, PreviewTrack] = {}
        self._waiting: deque[PreviewTrack] = deque()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="previews", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Drop what is not stored and end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)

    def follow(self, task_id: str, generation_id: GenerationId) -> PreviewTrack:
        track = PreviewTrack(self, task_id, ObjectRef(self._bucket, f"previews/gen-{generation_id}.jpg"))
        with self._changed:
            self._tracks[task_id] = track
        return track

    def latest(self, task_id: str) -> ShownPreview | None:
        """The newest preview of a job that is being drawn, stored or not."""
        with self._changed:
            track = self._tracks.get(task_id)
            return track.shown if track else None

    def offer(self, track: PreviewTrack, reported: _Reported) -> None:
        """Have a preview stored, in place of one of the same job that is not stored yet."""
        with self._changed:
            if track.is_closed:
                return
            track.pending = reported
            if track not in self._waiting:
                self._waiting.append(track)
            self._changed.notify_all()

    def retire(self, track: PreviewTrack) -> None:
        with self._changed:
            track.is_closed = True
            if self._tracks.get(track.task_id) is track:
                del self._tracks[track.task_id]
            if track in self._waiting:
                self._waiting.remove(track)
            self._changed.wait_for(lambda: not track.is_storing, timeout=STORE_DEADLINE_SECONDS + 1)

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            track, reported = taken
            track.shown = ShownPreview(reported.step_index, encode(reported.preview))
            self._store(track, track.shown.jpeg)
            with self._changed:
                track.is_storing = False
                self._changed.notify_all()

    def _take(self) -> tuple[PreviewTrack, _Reported] | None:
        """The next preview to store; blocks until there is one. None: closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closing)
            if self._is_closing:
                return None
            track = self._waiting.popleft()
            reported, track.pending = track.pending, None
            assert reported is not None, "a track waits with what is to be stored"  # noqa: S101
            track.is_storing = True
            return track, reported

    def _store(self, track: PreviewTrack, jpeg: bytes) -> None:
        try:
            self._storage.put(
                track.ref,
                jpeg,
                content_type=JPEG,
                cache_control=CACHE_CONTROL,
                deadline_seconds=STORE_DEADLINE_SECONDS,
            )
        except StorageError as error:
            log_event(logger, "preview not stored", logging.WARNING, task_id=track.task_id, reason=str(error))
        else:
            track.url = self._storage.public_url(track.ref)


def encode(preview: Preview) -> bytes:
    """The preview as a JPEG, enlarged where it is small."""
    size = (preview.width, preview.height)
    image = Image.frombytes("RGB", size, preview.rgb)
    factor = max(1, min(MAX_ENLARGEMENT, LONGEST_SIDE_PIXELS // max(size)))
    sink = BytesIO()
    enlarged = image.resize((factor * preview.width, factor * preview.height), Image.Resampling.BICUBIC)
    enlarged.save(sink, "JPEG", quality=JPEG_QUALITY)
    return sink.getvalue()
