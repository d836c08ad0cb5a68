"""Progress to the backend: lossy, in order, never after the end, and never at the expense of denoising."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable

from clients.storage.errors import StorageError
from clients.webhooks import Webhook, WebhookClient, WebhookKind, WebhookResult
from config.logs import log_event
from inference.request import StepReport
from worker.messages.generation_id import GenerationId
from worker.messages.webhook_bodies import ProgressBody
from worker.metrics import Metrics
from worker.progress.previews import Previewer, PreviewTrack
from worker.recent_mean import RecentMean
from worker.results.terminal_event import TerminalEvent

logger = logging.getLogger(__name__)

CALL_DEADLINE_SECONDS = 5.0
CLOSE_SECONDS = 2.0
# The thread looks at the clock this often, and takes a look that comes so late for a sign that the process was frozen.
PULSE_SECONDS, FREEZE_SECONDS = 0.25, 1.0
# Weight of the newest job's mean step time in the estimate a job starts with.
NEWEST_WEIGHT = 0.3


def milestones_between(before: float, now: float, milestones: tuple[int, ...]) -> tuple[int, ...]:
    """The milestones in `(before, now]`, percentages; pure."""
    return tuple(milestone for milestone in milestones if before < milestone <= now)


class Track:
    """One job's progress. `on_step` runs on the engine's owner thread and only ever takes a lock for a moment."""

    def __init__(
        self, reporter: "ProgressReporter", previews: PreviewTrack, task_id: str, generation_id: GenerationId
    ) -> None:
        self._reporter = reporter
        self._previews = previews
        self.task_id = task_id
        self._generation_id = generation_id
        self._percent = -1.0
        self._denoised_seconds = 0.0
        self.is_closed = False
        self.is_sending = False
        self.is_doubtful = False  # another worker may have ended the job while this process was frozen
        self.pending: deque[Webhook] = deque()

    def on_step(self, report: StepReport) -> None:
        if report.step_index == 0:
            self._denoised_seconds = 0.0  # the first start, or another one after a crash of the engine
        else:
            self._reporter.note_step(report.seconds)
        self._denoised_seconds += report.seconds
        self._previews.on_step(report)
        percent = 100 * report.step_index / report.num_steps
        crossed = milestones_between(self._percent, percent, self._reporter.milestones)
        self._percent = max(self._percent, percent)
        if crossed:
            self._reporter.offer(self, [self._webhook(milestone, report) for milestone in crossed])
        if report.step_index == report.num_steps:
            self._reporter.learn(self._denoised_seconds / report.num_steps)

    def seconds_left(self, report: StepReport) -> float:
        """The estimate of what the steps behind `report`, the newest one, will take."""
        done = report.step_index
        step_seconds = self._denoised_seconds / done if done else self._reporter.step_seconds
        return step_seconds * (report.num_steps - done)

    def close(self) -> None:
        """Drop what is unsent and wait for a call in flight: nothing of this track is sent after this returns."""
        self._previews.close()
        self._reporter.retire(self)

    def _webhook(self, milestone: int, report: StepReport) -> Webhook:
        body: ProgressBody = {
            "generation_id": self._generation_id,
            "progress": {
                "current_step": report.step_index,
                "total_steps": report.num_steps,
                "progress_percent": milestone,
                "estimated_seconds": math.ceil(self.seconds_left(report)),
            },
        }
        if self._previews.url is not None:
            body["preview_url"] = self._previews.url
        return Webhook(WebhookKind.PROGRESS, f"{self.task_id}:progress:{milestone}", body)


class ProgressReporter:
    """Owner of the thread that sends progress. A newer report replaces one of the same job still unsent."""

    def __init__(
        self,
        client: WebhookClient,
        previewer: Previewer,
        milestones: tuple[int, ...],
        metrics: Metrics,
        end_of: Callable[[str], TerminalEvent | None] = lambda _task_id: None,
    ) -> None:
        """`end_of` finds a task's recorded end; it raises `StorageError` where the store does not tell."""
        self._end_of = end_of
        self._tracks: set[Track] = set()
        self._client = client
        self._previewer = previewer
        self._metrics = metrics
        self._changed = threading.Condition()
        self._waiting: deque[Track] = deque()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._steps_lately = RecentMean()
        self.milestones = milestones
        self.step_seconds = 0.0

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Drop what is unsent and end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)

    def follow(self, task_id: str, generation_id: GenerationId) -> Track:
        track = Track(self, self._previewer.follow(task_id, generation_id), task_id, generation_id)
        with self._changed:
            self._tracks.add(track)
        return track

    def learn(self, step_seconds: float) -> None:
        """Take a measured step time into the estimate that jobs start with."""
        known = self.step_seconds or step_seconds
        self.step_seconds = known + NEWEST_WEIGHT * (step_seconds - known)

    def note_step(self, seconds: float) -> None:
        """Take one step of any job into `recent_step_seconds`."""
        self._steps_lately.note(seconds)

    @property
    def recent_step_seconds(self) -> float:
        """What jobs' steps take lately, whether or not one of them has ended; before the first, as `learn` heard."""
        return self._steps_lately.value or self.step_seconds

    def offer(self, track: Track, webhooks: list[Webhook]) -> None:
        with self._changed:
            if track.is_closed:
                return
            if track not in self._waiting:
                self._waiting.append(track)
            track.pending = deque(webhooks)
            self._changed.notify_all()

    def retire(self, track: Track) -> None:
        with self._changed:
            track.is_closed = True
            self._tracks.discard(track)
            track.pending.clear()
            self._changed.wait_for(lambda: not track.is_sending, timeout=CALL_DEADLINE_SECONDS + 1)

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            track, webhook = taken
            if not track.is_doubtful or self._is_open(track):
                self._send(webhook)
            with self._changed:
                track.is_sending = False
                self._changed.notify_all()

    def _take(self) -> tuple[Track, Webhook] | None:
        """The next report to send; blocks until there is one. None: closing."""
        with self._changed:
            while True:
                self._wait_for_work()
                if self._is_closing:
                    return None
                track = self._waiting.popleft()
                if not track.pending:
                    continue
                webhook = track.pending.popleft()
                if track.pending:
                    self._waiting.append(track)
                track.is_sending = True
                return track, webhook

    def _wait_for_work(self) -> None:
        while True:
            looked_at = time.monotonic()
            self._changed.wait_for(lambda: self._waiting or self._is_closing, timeout=PULSE_SECONDS)
            if time.monotonic() - looked_at > FREEZE_SECONDS:
                for track in self._tracks:
                    track.is_doubtful = True
            if self._waiting or self._is_closing:
                return

    def _is_open(self, track: Track) -> bool:
        """Whether the job still has no end; a report of one that may have an end is dropped."""
        try:
            track.is_doubtful = self._end_of(track.task_id) is not None
        except StorageError as error:
            log_event(logger, "progress not sent", logging.WARNING, task_id=track.task_id, reason=str(error))
        return not track.is_doubtful

    def _send(self, webhook: Webhook) -> None:
        attempt = self._client.send(webhook, deadline_seconds=CALL_DEADLINE_SECONDS)
        self._metrics.webhooks.labels(webhook.kind.value, attempt.result.name.lower()).inc()
        if attempt.result is not WebhookResult.DELIVERED:
            log_event(logger, "progress not taken", logging.DEBUG, reason=attempt.reason)
