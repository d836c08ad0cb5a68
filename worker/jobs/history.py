"""History of the last jobs that ended here, for the status page; what it may show is decided as they are added."""

import re
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from worker.errors import ErrorCode
from worker.jobs.runs import Run
from worker.last_hour import LastHour
from worker.messages.job import Job
from worker.outcome import Outcome

MAX_ENDED = 50
MAX_MESSAGE_CHARS = 500
# URL path of thumbnails, relative to the status page.
THUMBNAIL_FOLDER = "status/thumbnail/"
# Their messages end with a text of the engine or the store, which may quote a prompt or name an image's object.
QUOTING_CODES = frozenset({ErrorCode.ENGINE_ERROR, ErrorCode.STORAGE_UNAVAILABLE})
# Values of a job's message are quoted as Python writes them: a quotation mark after a space, a bracket or nothing.
_QUOTATION = re.compile(r"(?:^|(?<=[\s(\[]))['\"]")
# The code of a recorded end is whatever its record has: no sentence gets onto the page.
_CODE = re.compile(r"[A-Z_]+")


@dataclass(frozen=True, slots=True)
class StageTime:
    """A stage's name and the seconds it took."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class EndedJob:
    """A run that is over. `generation_id` is text, as JavaScript cannot hold all of its numbers; `finished_at` is in
    epoch seconds. `message` is what may be shown of the reason; `num_steps` is None where it is not known, and so is
    `waited_seconds` in the queue. `prompt`, `result_urls` and `thumbnail`, a relative URL, are there where prompts are
    shown."""

    generation_id: str
    task_id: str
    outcome: Outcome
    code: str
    message: str
    finished_at: float
    seconds: float
    stages: tuple[StageTime, ...]
    num_steps: int | None
    num_images: int
    attempt: int
    waited_seconds: float | None
    prompt: str | None
    result_urls: tuple[str, ...]
    thumbnail: str | None


class _Entry(NamedTuple):
    job: EndedJob
    thumbnail: bytes | None


class History:
    """The newest `MAX_ENDED` ends, and the last hour's numbers. Thread-safe; without `shows_prompts` it holds no
    prompt, no address and no thumbnail."""

    def __init__(self, *, shows_prompts: bool, clock: Callable[[], float] = time.time) -> None:
        self.shows_prompts = shows_prompts
        self._clock = clock
        self._lock = threading.Lock()
        self._ended: deque[_Entry] = deque(maxlen=MAX_ENDED)
        self.last_hour = LastHour()

    def add(self, run: Run, outcome: Outcome, *, code: str, message: str, result_urls: tuple[str, ...] = ()) -> None:
        """Add a run that has just ended."""
        stages = tuple(StageTime(name, seconds) for name, _, seconds in run.timeline())
        job = run.decoded if isinstance(run.decoded, Job) else None
        num_steps = job.num_inference_steps if job else None
        if run.progress is not None:
            num_steps = run.progress.num_steps
        # A job that failed or is to run again has no image to show, even if one was finished.
        thumbnail = run.thumbnail if self.shows_prompts and outcome is Outcome.COMPLETE else None
        ended = EndedJob(
            generation_id=str(run.generation_id),
            task_id=run.task_id,
            outcome=outcome,
            code=code if _CODE.fullmatch(code) else "",
            message=public_message(code, message, may_quote=self.shows_prompts),
            finished_at=self._clock(),
            seconds=run.seconds,
            stages=stages,
            num_steps=num_steps,
            num_images=job.num_images if job else 0,
            attempt=run.attempt,
            waited_seconds=run.waited_seconds,
            prompt=job.prompt if job and self.shows_prompts else None,
            result_urls=result_urls if self.shows_prompts else (),
            thumbnail=f"{THUMBNAIL_FOLDER}{run.task_id}.jpg" if thumbnail else None,
        )
        self.last_hour.add_job(outcome, ended.seconds, ended.waited_seconds)
        with self._lock:
            self._ended.append(_Entry(ended, thumbnail))

    def newest_first(self) -> tuple[EndedJob, ...]:
        """Return the ends, the newest first."""
        with self._lock:
            return tuple(entry.job for entry in reversed(self._ended))

    def thumbnail(self, task_id: str) -> bytes | None:
        """Return the thumbnail of a task's newest end that has one, a JPEG."""
        with self._lock:
            found = (entry.thumbnail for entry in reversed(self._ended) if entry.job.task_id == task_id)
            return next(filter(None, found), None)


def public_message(code: str, message: str, *, may_quote: bool) -> str:
    """Return what a page without a password may show of an error: the text before the first quotation, unless it
    `may_quote`.

    A message may quote a prompt, or credentials that a publisher wrote into a location. Pure.
    """
    if code in QUOTING_CODES:
        return message.partition(":")[0][:MAX_MESSAGE_CHARS]
    quotation = None if may_quote else _QUOTATION.search(message)
    shown = message if quotation is None else message[: quotation.start()] + "…"
    return shown if len(shown) <= MAX_MESSAGE_CHARS else shown[:MAX_MESSAGE_CHARS] + "…"
