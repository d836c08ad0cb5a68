"""Build the status from the parts of the worker and the metrics' own values. Never blocks; any thread may call it."""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Self

from prometheus_client import CollectorRegistry

from inference.request import ModelFacts
from worker.amqp.topology import QueueNames
from worker.jobs.history import THUMBNAIL_FOLDER, History
from worker.jobs.runs import Run
from worker.metrics import Metrics
from worker.monitoring.headline import headline
from worker.monitoring.idle import IdleTimer
from worker.monitoring.status import (
    PREVIEW_FOLDER,
    BatchStatus,
    CacheStatus,
    GpuStatus,
    IdleStatus,
    ModelStatus,
    QueueStatus,
    SlotsStatus,
    Status,
    WebhooksStatus,
    WorkerStatus,
    job_status,
    strip_details,
)
from worker.progress.previews import Previewer
from worker.progress.reporter import ProgressReporter
from worker.results.notifier import Notifier

PREFIX = "darkroom_"
SLOT_STATES = ("active", "idle", "free")


@dataclass(frozen=True, slots=True)
class MetricsSnapshot:
    """Every sample of the metrics at one moment but for histograms' buckets, by name behind the prefix and labels.

    The status page reads these values, so that it cannot disagree with Prometheus.
    """

    values: Mapping[tuple[str, ...], float]

    @classmethod
    def of(cls, registry: CollectorRegistry) -> Self:
        samples = [sample for metric in registry.collect() for sample in metric.samples]
        return cls(
            {
                (sample.name.removeprefix(PREFIX), *sample.labels.values()): sample.value
                for sample in samples
                if not sample.name.endswith("_bucket")
            }
        )

    def value(self, name: str, *labels: str) -> float:
        """Return one sample; 0 where there is none yet."""
        return self.values.get((name, *labels), 0.0)

    def by_label(self, name: str) -> dict[str, float]:
        """Return every sample of a metric by its first label, summed over the others."""
        sums: dict[str, float] = {}
        for key, value in self.values.items():
            if key[0] == name and len(key) > 1:
                sums[key[1]] = sums.get(key[1], 0.0) + value
        return sums


@dataclass(frozen=True, slots=True)
class StatusBuilder:
    """Builder of the status. `began_at` is `time.time()`; `runs` and `facts` return the current ones."""

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

    def build(self) -> Status:
        """Return the current status. Takes the calling thread a millisecond or two."""
        at, now = time.time(), time.monotonic()
        snapshot = MetricsSnapshot.of(self.metrics.registry)
        runs = sorted(self.runs(), key=lambda run: run.started_monotonic)
        batch, why_not_ready = self._batch(snapshot), strip_details(self.why_not_ready())
        num_restarts, idle_reason = int(snapshot.value("engine_restarts_total")), self.idle.reason
        return Status(
            at=at,
            headline=headline(
                why_not_ready=why_not_ready,
                idle_reason=idle_reason,
                num_lanes=batch.num_lanes,
                num_jobs=len(runs),
                num_restarts=num_restarts,
            ),
            worker=WorkerStatus(
                name=self.name,
                version=self.version,
                started_at=self.began_at,
                uptime_seconds=round(at - self.began_at, 1),
                why_not_ready=why_not_ready,
            ),
            model=self._model(),
            jobs=tuple(
                job_status(run, now, shows_prompts=self.shows_prompts, preview=self.previewer.latest(run.task_id))
                for run in runs
            ),
            batch=batch,
            slots=SlotsStatus(**{state: int(snapshot.value("adapter_slots", state)) for state in SLOT_STATES}),
            cache=CacheStatus(int(snapshot.value("adapter_cache_bytes")), self.max_cache_bytes),
            gpu=_gpu(snapshot),
            queues=self._queues(snapshot),
            # The broker counts ready messages only: those that this worker holds are added.
            webhooks=WebhooksStatus(
                int(snapshot.value("outbox_events") + snapshot.value("queue_messages", self.names.outbox)),
                self.notifier.failing,
            ),
            outcomes={outcome: int(count) for outcome, count in snapshot.by_label("jobs_total").items()},
            engine_restarts=num_restarts,
            idle=IdleStatus(
                idle_reason,
                round(self.idle.denoising_seconds, 1),
                {reason: round(spent, 1) for reason, spent in snapshot.by_label("idle_seconds_total").items()},
            ),
            last_hour=self.history.last_hour.summary(),
            last_jobs=self.history.newest_first(),
        )

    def read_image(self, path: str) -> bytes | None:
        """Return the JPEG at a relative URL: the newest preview of a running job, or an ended one's thumbnail.

        None where there is none, or none may be shown: it shows what the prompt says, so the rule for prompts holds.
        """
        name = path.removesuffix(".jpg")
        if not self.shows_prompts or name == path:
            return None
        if name.startswith(THUMBNAIL_FOLDER):
            return self.history.thumbnail(name.removeprefix(THUMBNAIL_FOLDER))
        shown = self.previewer.latest(name.removeprefix(PREVIEW_FOLDER)) if name.startswith(PREVIEW_FOLDER) else None
        return shown.jpeg if shown else None

    def _model(self) -> ModelStatus | None:
        facts = self.facts()
        if facts is None:
            return None
        return ModelStatus(
            model=facts.model,
            family=facts.family,
            device=facts.device,
            dtype=facts.dtype,
            base_size=facts.base_size,
            load_seconds=facts.load_seconds,
            step_seconds=facts.step_seconds,
            # Before the first step, the estimate.
            recent_step_seconds=self.progress.recent_steps.value or self.progress.step_seconds,
        )

    def _batch(self, snapshot: MetricsSnapshot) -> BatchStatus:
        num_steps = int(snapshot.value("denoise_steps_total"))
        mean = snapshot.value("denoise_lane_steps_total") / num_steps if num_steps else 0.0
        num_lanes = int(snapshot.value("lanes"))
        return BatchStatus(num_lanes, self.max_lanes, num_steps, round(mean, 3), round(self.metrics.recent_batch, 3))

    def _queues(self, snapshot: MetricsSnapshot) -> tuple[QueueStatus, ...]:
        return tuple(
            QueueStatus(name, self.names.role(name), int(depth))
            for name, depth in snapshot.by_label("queue_messages").items()
        )


def _gpu(snapshot: MetricsSnapshot) -> GpuStatus | None:
    used, total = (int(snapshot.value("gpu_memory_bytes", kind)) for kind in ("used", "total"))
    return GpuStatus(used, total, snapshot.value("gpu_utilization_ratio")) if total else None
