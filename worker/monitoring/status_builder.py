"""Gathers the status: a look at every part, from any thread, that waits for none of them."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from inference.request import ModelFacts
from worker.amqp.topology import QueueNames
from worker.jobs.history import History
from worker.jobs.runs import Run
from worker.metrics import Metrics
from worker.monitoring.idle import IdleTimer
from worker.monitoring.readings import MetricsSnapshot
from worker.monitoring.status import (
    BatchNow,
    CacheNow,
    GpuNow,
    IdleNow,
    JobNow,
    ModelNow,
    QueueNow,
    SlotsNow,
    Status,
    WebhooksNow,
    WorkerNow,
    job_now,
    without_details,
)
from worker.progress.previews import Previewer
from worker.progress.reporter import ProgressReporter
from worker.results.notifier import Notifier


@dataclass(frozen=True, slots=True)
class StatusBuilder:
    """The parts that the status is made of. `began_at` is `time.time()`; `runs` and `facts` give what there is now."""

    name: str
    version: str
    began_at: float
    names: QueueNames
    metrics: Metrics
    idle: IdleTimer
    history: History
    notifier: Notifier
    progress: ProgressReporter
    previewer: Previewer
    max_lanes: int
    max_cache_bytes: int
    shows_prompts: bool
    why_not_ready: Callable[[], str]
    facts: Callable[[], ModelFacts | None]
    runs: Callable[[], Collection[Run]]

    def read(self) -> Status:
        """The worker now. Takes a millisecond or two and nobody's time but the caller's."""
        at, now = time.time(), time.monotonic()
        readings = MetricsSnapshot.of(self.metrics.registry)
        runs = sorted(self.runs(), key=lambda run: run.started_monotonic)
        return Status(
            at=at,
            worker=self._worker(at),
            model=self._model(),
            jobs=tuple(self._job(run, now) for run in runs),
            batch=self._batch(readings),
            slots=_slots(readings),
            cache=CacheNow(int(readings.value("adapter_cache_bytes")), self.max_cache_bytes),
            gpu=_gpu(readings),
            queues=self._queues(readings),
            webhooks=self._webhooks(readings),
            outcomes={outcome: int(count) for outcome, count in readings.by_label("jobs_total").items()},
            engine_restarts=int(readings.value("engine_restarts_total")),
            idle=self._idle(readings),
            last_jobs=self.history.newest_first(),
        )

    def read_preview(self, task_id: str) -> bytes | None:
        """The newest preview of a job at work, a JPEG; None where there is none, or none may be shown.

        It shows what the prompt says, so that what holds for prompts holds for it.
        """
        shown = self.previewer.latest(task_id) if self.shows_prompts else None
        return shown.jpeg if shown else None

    def _job(self, run: Run, now: float) -> JobNow:
        return job_now(run, now, shows_prompts=self.shows_prompts, preview=self.previewer.latest(run.task_id))

    def _worker(self, at: float) -> WorkerNow:
        return WorkerNow(
            name=self.name,
            version=self.version,
            started_at=self.began_at,
            uptime_seconds=round(at - self.began_at, 1),
            why_not_ready=without_details(self.why_not_ready()),
        )

    def _model(self) -> ModelNow | None:
        facts = self.facts()
        if facts is None:
            return None
        return ModelNow(
            model=facts.model,
            family=facts.family,
            device=facts.device,
            dtype=facts.dtype,
            base_size=facts.base_size,
            load_seconds=facts.load_seconds,
            step_seconds=facts.step_seconds,
            recent_step_seconds=self.progress.recent_step_seconds,
        )

    def _batch(self, readings: MetricsSnapshot) -> BatchNow:
        num_steps = int(readings.value("denoise_steps_total"))
        mean = readings.value("denoise_lane_steps_total") / num_steps if num_steps else 0.0
        num_lanes = int(readings.value("lanes"))
        return BatchNow(num_lanes, self.max_lanes, num_steps, round(mean, 3), round(self.metrics.recent_batch, 3))

    def _queues(self, readings: MetricsSnapshot) -> tuple[QueueNow, ...]:
        depths = readings.by_label("queue_messages")
        return tuple(
            QueueNow(name, name.removeprefix(f"{self.names.jobs}.") if name != self.names.jobs else "jobs", int(depth))
            for name, depth in depths.items()
        )

    def _webhooks(self, readings: MetricsSnapshot) -> WebhooksNow:
        # Those in this worker's hands are not ready, so the broker's count lacks them.
        num_waiting = readings.value("outbox_events") + readings.value("queue_messages", self.names.outbox)
        return WebhooksNow(int(num_waiting), self.notifier.failing)

    def _idle(self, readings: MetricsSnapshot) -> IdleNow:
        seconds = {reason: round(spent, 1) for reason, spent in readings.by_label("idle_seconds_total").items()}
        return IdleNow(self.idle.reason, round(self.idle.denoising_seconds, 1), seconds)


def _slots(readings: MetricsSnapshot) -> SlotsNow:
    active, idle, free = (int(readings.value("adapter_slots", state)) for state in ("active", "idle", "free"))
    return SlotsNow(active, idle, free)


def _gpu(readings: MetricsSnapshot) -> GpuNow | None:
    used, total = (int(readings.value("gpu_memory_bytes", kind)) for kind in ("used", "total"))
    return GpuNow(used, total, readings.value("gpu_utilization_ratio")) if total else None
