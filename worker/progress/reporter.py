"""Progress webhooks: lossy, in order, never after the terminal event; no denoising step waits for them."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace

from clients.storage.errors import StorageError
from clients.webhooks import NO_SUCH_METHOD_STATUSES, Webhook, WebhookClient, WebhookKind, WebhookResult
from config.logs import log_event
from inference.request import StepReport
from worker.messages.generation_id import GenerationId
from worker.messages.webhook_bodies import ProgressBody
from worker.metrics import Metrics
from worker.progress.latest_wins import LatestWins, Source
from worker.progress.previews import JobPreviews, Previewer
from worker.recent_mean import RecentMean
from worker.results.terminal_event import TerminalEvent
from worker.tracing.context import NO_TRACE, TraceContext

logger = logging.getLogger(__name__)

CALL_DEADLINE_SECONDS = 5.0
# Weight of the newest job's mean step time in the estimate a job starts with.
NEWEST_WEIGHT = 0.3


def milestones_between(before: float, now: float, milestones: tuple[int, ...]) -> tuple[int, ...]:
    """Return the milestones in `(before, now]`, in percent. Pure."""
    return tuple(milestone for milestone in milestones if before < milestone <= now)


class JobProgress(Source[Webhook]):
    """One job's progress. `on_step` runs on the engine's owner thread and only takes a lock."""

    def __init__(
        self,
        reporter: "ProgressReporter",
        previews: JobPreviews,
        task_id: str,
        generation_id: GenerationId,
        trace: TraceContext,
    ) -> None:
        super().__init__()
        self._trace = trace
        self._reporter = reporter
        self._previews = previews
        self.task_id = task_id
        self._generation_id = generation_id
        self._percent = -1.0
        self._denoised_seconds = 0.0
        self.may_have_ended = False  # another worker may have ended the job while this process was frozen

    def on_step(self, report: StepReport) -> None:
        """Update the estimate and have the milestones crossed reported."""
        if report.step_index == 0:
            self._denoised_seconds = 0.0  # the first start, or a restart after a crash of the engine
        else:
            self._reporter.recent_steps.add(report.seconds)
        self._denoised_seconds += report.seconds
        self._previews.on_step(report)
        percent = 100 * report.step_index / report.num_steps
        crossed = milestones_between(self._percent, percent, self._reporter.milestones)
        self._percent = max(self._percent, percent)
        if crossed:
            self._reporter.queue.offer(self, [self._webhook(milestone, report) for milestone in crossed])
        if report.step_index == report.num_steps:
            self._reporter.update_estimate(self._denoised_seconds / report.num_steps)

    def on_freeze(self) -> None:
        """Have the job's recorded end looked up before the next webhook."""
        self.may_have_ended = True

    def seconds_left(self, report: StepReport) -> float:
        """Return the estimated time of the steps after `report`, the newest one."""
        done = report.step_index
        step_seconds = self._denoised_seconds / done if done else self._reporter.step_seconds
        return step_seconds * (report.num_steps - done)

    def with_valid_urls(self, webhook: Webhook) -> Webhook:
        """Return the webhook with its preview's address valid from now on. Raises `StorageError`."""
        if "preview_url" not in webhook.body:
            return webhook
        return replace(webhook, body={**webhook.body, "preview_url": self._previews.current_url()})

    def close(self) -> None:
        """Drop what is unsent and wait for a call in flight: nothing of this job is sent after this returns."""
        self._previews.close()
        self._reporter.queue.retire(self)

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
        return Webhook(WebhookKind.PROGRESS, f"{self.task_id}:progress:{milestone}", body, self._trace.headers)


class ProgressReporter:
    """Sends progress webhooks on a thread of their own. Newer reports of a job replace its unsent ones."""

    def __init__(
        self,
        client: WebhookClient,
        previewer: Previewer,
        milestones: tuple[int, ...],
        metrics: Metrics,
        end_of: Callable[[str], TerminalEvent | None] = lambda _task_id: None,
    ) -> None:
        """Create a reporter; `end_of` returns a task's recorded event, or raises `StorageError`."""
        self._end_of = end_of
        self._client = client
        self._previewer = previewer
        self._metrics = metrics
        self.recent_steps = RecentMean()  # of all jobs, finished or not
        self.milestones = milestones
        self.step_seconds = 0.0
        self._has_warned = False
        self.queue = LatestWins[JobProgress, Webhook](
            "progress", self._send, handle_seconds=CALL_DEADLINE_SECONDS, on_freeze=JobProgress.on_freeze
        )

    def start(self) -> None:
        """Start the thread."""
        self.queue.start()

    def close(self) -> None:
        """Drop what is unsent and end the thread."""
        self.queue.close()

    def follow(self, task_id: str, generation_id: GenerationId, trace: TraceContext = NO_TRACE) -> JobProgress:
        """Return the progress of a job that begins."""
        progress = JobProgress(self, self._previewer.follow(task_id, generation_id), task_id, generation_id, trace)
        self.queue.add(progress)
        return progress

    def update_estimate(self, step_seconds: float) -> None:
        """Average a measured step time into the estimate that jobs start with."""
        known = self.step_seconds or step_seconds
        self.step_seconds = known + NEWEST_WEIGHT * (step_seconds - known)

    def _send(self, progress: JobProgress, webhook: Webhook) -> None:
        if progress.may_have_ended:
            try:
                progress.may_have_ended = self._end_of(progress.task_id) is not None
            except StorageError as error:
                log_event(logger, "progress not sent", logging.WARNING, task_id=progress.task_id, reason=str(error))
            if progress.may_have_ended:  # or the store does not answer
                return
        try:
            webhook = progress.with_valid_urls(webhook)
        except StorageError as error:
            log_event(logger, "progress not sent", logging.WARNING, task_id=progress.task_id, reason=str(error))
            return
        attempt = self._client.send(webhook, deadline_seconds=CALL_DEADLINE_SECONDS)
        self._metrics.webhooks.labels(webhook.kind.value, attempt.result.name.lower()).inc()
        if attempt.result is not WebhookResult.DELIVERED:
            # None will be taken, and nothing else would say so: once.
            is_worth_a_warning = attempt.status in NO_SUCH_METHOD_STATUSES and not self._has_warned
            self._has_warned = self._has_warned or is_worth_a_warning
            level = logging.WARNING if is_worth_a_warning else logging.DEBUG
            log_event(logger, "progress not taken", level, reason=attempt.reason)
