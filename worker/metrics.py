"""The Prometheus metrics, by the names in docs/operating.md, in a registry of their own."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, disable_created_metrics

from config.redacting import redacted
from inference.request import EngineLoad, ModelLoad
from worker.errors import ErrorCode
from worker.outcome import Outcome
from worker.recent_mean import RecentMean
from worker.version import darkroom_version

# A _created series beside each counter doubles what Prometheus stores, and no query of ours uses it.
disable_created_metrics()  # type: ignore[no-untyped-call]

JOB_BUCKETS = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800)
STAGE_BUCKETS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 300)
WAIT_BUCKETS = (0.1, 1, 5, 15, 60, 300, 900, 3600, 14400)
# Every code that an outcome may have; of others "", which Prometheus takes for a label that is not there.
OTHER_CODE = "OTHER"
CODES: dict[Outcome, tuple[str, ...]] = {
    Outcome.FAILED: (*(code for code in ErrorCode if code is not ErrorCode.CANCELLED), OTHER_CODE),
    Outcome.CANCELLED: (ErrorCode.CANCELLED,),
    Outcome.RETRIED: (
        ErrorCode.STORAGE_UNAVAILABLE,
        ErrorCode.ENGINE_ERROR,
        ErrorCode.GPU_OOM,
        ErrorCode.INTERNAL_ERROR,
        OTHER_CODE,
    ),
}
# Without lanes for this long, there is no recent batch size.
STALE_SECONDS = 60.0


class Metrics:
    """Every metric of one worker. Thread-safe, as prometheus-client's are."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self.ready = self._gauge("ready", "1 while jobs are taken, as /health/ready says")
        self.build = Info("darkroom_build", "Version of the worker, and its model", registry=self.registry)
        self.jobs = self._counter("jobs", "Jobs by how they ended, and why they failed", "outcome", "code")
        self.job_seconds = self._histogram("job_seconds", "From delivery to settling", JOB_BUCKETS)
        self.stage_seconds = self._histogram("stage_seconds", "Time in each stage of a job", STAGE_BUCKETS, "stage")
        self.queue_wait_seconds = self._histogram(
            "queue_wait_seconds", "From the job's created_at to its delivery", WAIT_BUCKETS
        )
        self.denoise_steps = self._counter("denoise_steps", "Forwards of the denoiser")
        self.denoise_lane_steps = self._counter("denoise_lane_steps", "Steps of all lanes; over steps: the mean batch")
        self.lanes = self._gauge("lanes", "Pictures being denoised")
        self.adapter_slots = self._gauge("adapter_slots", "Adapters in the model by state", "state")
        self.adapter_cache_bytes = self._gauge("adapter_cache_bytes", "Size of the download cache")
        self.gpu_memory_bytes = self._gauge("gpu_memory_bytes", "Memory of the GPU", "kind")
        self.gpu_utilization_ratio = self._gauge("gpu_utilization_ratio", "Utilization of the GPU, 0 to 1")
        self.queue_messages = self._gauge("queue_messages", "Messages ready in each queue", "queue")
        self.outbox_events = self._gauge("outbox_events", "Ends this worker holds that the backend has not taken yet")
        self.outbox_age_seconds = self._gauge("outbox_age_seconds", "Since the oldest of them was parked, or 0")
        self.webhooks = self._counter("webhooks", "Webhook attempts", "kind", "result")
        self.webhooks_ambiguous = self._counter("webhook_ambiguous", "Attempts whose answer was lost: maybe taken")
        self.ignored_fields = self._counter("ignored_fields", "Fields of jobs that no worker knows")
        self.engine_restarts = self._counter("engine_restarts", "Engine processes started after a crash")
        self.model_on_device = self._gauge("model_on_device", "1 while the model of MODELS is on the device", "model")
        self.model_waiting = self._gauge("model_waiting", "Jobs that have not begun, by the model they name", "model")
        self.model_lanes = self._gauge("model_lanes", "Pictures being denoised by each model", "model")
        self.model_adapter_slots = self._gauge("model_adapter_slots", "Adapters in each model", "model", "state")
        self.model_switches = self._counter("model_switches", "Times that the model came to the device", "model")
        self.idle_seconds = self._counter("idle_seconds", "Time without denoising, by reason", "reason")
        # At 0 from the start: Prometheus sees no increase in a counter that appears with its first job.
        for outcome in Outcome:
            for code in CODES.get(outcome, ("",)):
                self.jobs.labels(outcome, code)
        # Prometheus has `rate` for it.
        self._recent_batch = RecentMean(clock)
        self._load_gauges = (self.lanes, *(self.adapter_slots.labels(state) for state in ("active", "idle", "free")))
        self._gauged: tuple[int, ...] = ()
        self._gauged_models: tuple[ModelLoad, ...] = ()
        # The model that comes to the device now.
        self.switching_to = ""
        self._set_gauges(EngineLoad(num_batched=0, num_lanes=0, slots_active=0, slots_idle=0, slots_free=0))

    def set_build(self, *, model: str, family: str = "") -> None:
        """Set what runs here; `family` is known once the model is loaded."""
        self.build.info({"version": darkroom_version(), "family": family, "model": redacted(model)})

    def count_job(self, outcome: Outcome, code: str = "") -> None:
        """Count an end. Its code may be of a record that another version wrote: an unknown one is not a label."""
        known = CODES.get(outcome, ("",))
        self.jobs.labels(outcome, code if code in known else known[-1]).inc()

    def note_engine_load(self, engine_load: EngineLoad) -> None:
        """Count the forward of one engine loop iteration, if it had one, and set the gauges of the engine's load."""
        if engine_load.num_batched:
            self.denoise_steps.inc()
            self.denoise_lane_steps.inc(engine_load.num_batched)
            self._recent_batch.add(engine_load.num_batched)
        self.switching_to = engine_load.switching_to
        if self.switching_to:
            self.model_switches.labels(self.switching_to).inc()
        self._set_gauges(engine_load)
        self._set_gauges_of_models(engine_load.models)

    @property
    def recent_batch(self) -> float:
        """Recent mean batch size; 0 where there was no forward recently."""
        is_stale = self._num_lanes == 0 and self._recent_batch.age_seconds > STALE_SECONDS
        return 0.0 if is_stale else self._recent_batch.value

    def _set_gauges(self, engine_load: EngineLoad) -> None:
        self._num_lanes = engine_load.num_lanes
        values = (engine_load.num_lanes, engine_load.slots_active, engine_load.slots_idle, engine_load.slots_free)
        if values == self._gauged:
            return  # as after most steps
        self._gauged = values
        for gauge, value in zip(self._load_gauges, values, strict=True):
            gauge.set(value)

    def _set_gauges_of_models(self, models: tuple[ModelLoad, ...]) -> None:
        if models == self._gauged_models:
            return
        self._gauged_models = models
        for model in models:
            self.model_on_device.labels(model.name).set(model.is_on_device)
            self.model_waiting.labels(model.name).set(model.num_waiting)
            self.model_lanes.labels(model.name).set(model.num_lanes)
            self.model_adapter_slots.labels(model.name, "active").set(model.slots_active)
            self.model_adapter_slots.labels(model.name, "idle").set(model.slots_idle)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"darkroom_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"darkroom_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"darkroom_{name}", text, labels, buckets=buckets, registry=self.registry)
