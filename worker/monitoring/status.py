"""Status of the worker at one moment, as served in /status.json: frozen and without secrets."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from worker.jobs.history import EndedJob
from worker.jobs.runs import Run
from worker.last_hour import HourSummary
from worker.messages.job import Job
from worker.progress.previews import ShownPreview

# URL path of previews, relative to the status page.
PREVIEW_FOLDER = "status/preview/"


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """Status of the process: `name` is host and process id, `why_not_ready` is empty once it takes jobs."""

    name: str
    version: str
    started_at: float
    uptime_seconds: float
    why_not_ready: str


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """The loaded model. `step_seconds` was measured by the warm-up; `recent_step_seconds` is the duration of jobs'
    steps, whatever their batch size."""

    model: str
    family: str
    device: str
    dtype: str
    base_size: int
    load_seconds: float
    step_seconds: float
    recent_step_seconds: float


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A running job. `generation_id` is text, as JavaScript's numbers have 53 bits; the steps are 0 of 0 before
    denoising, and `seconds_left` is the estimate for the remaining ones. `prompt` is None unless it may be shown, and
    so is `preview`, the relative URL of the newest one."""

    generation_id: str
    task_id: str
    phase: str
    step_index: int
    num_steps: int
    seconds_left: float | None
    seconds: float
    num_images: int
    attempt: int
    adapters: tuple[str, ...]
    is_cancelled: bool
    prompt: str | None
    preview: str | None


@dataclass(frozen=True, slots=True)
class BatchStatus:
    """Lanes, and mean lanes per forward: since the start (`mean`) and of recent forwards (`recent`, 0 without any)."""

    num_lanes: int
    max_lanes: int
    num_steps: int
    mean: float
    recent: float


@dataclass(frozen=True, slots=True)
class SlotsStatus:
    """Adapter slots by state."""

    active: int
    idle: int
    free: int


@dataclass(frozen=True, slots=True)
class CacheStatus:
    """The download cache."""

    size_bytes: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class GpuStatus:
    """Memory and utilization (0 to 1) of the GPU."""

    memory_used_bytes: int
    memory_total_bytes: int
    utilization_ratio: float


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """A queue and its ready messages; `role` is its purpose: `jobs`, `retry.30`, `dead` …"""

    name: str
    role: str
    num_messages: int


@dataclass(frozen=True, slots=True)
class WebhooksStatus:
    """Terminal events that the backend has not accepted yet, and the kinds of webhook that fail."""

    num_waiting: int
    failing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class IdleStatus:
    """`reason` why the GPU is idle, None while it denoises; seconds denoising and idle by reason since the start."""

    reason: str | None
    denoising_seconds: float
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Status:
    """The whole status, `at` in epoch seconds. Running jobs are sorted oldest first, ended ones newest first."""

    at: float
    headline: str
    worker: WorkerStatus
    model: ModelStatus | None
    jobs: tuple[JobStatus, ...]
    batch: BatchStatus
    slots: SlotsStatus
    cache: CacheStatus
    gpu: GpuStatus | None
    queues: tuple[QueueStatus, ...]
    webhooks: WebhooksStatus
    outcomes: Mapping[str, int]
    engine_restarts: int
    idle: IdleStatus
    last_hour: HourSummary
    last_jobs: tuple[EndedJob, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), allow_nan=False)


def job_status(run: Run, now: float, *, shows_prompts: bool, preview: ShownPreview | None) -> JobStatus:
    """Build the status of a running job; `now` is `time.monotonic()`. Pure."""
    job = run.decoded if isinstance(run.decoded, Job) else None
    reached = run.progress
    return JobStatus(
        generation_id=str(run.generation_id),
        task_id=run.task_id,
        phase=run.phase,
        step_index=reached.step_index if reached else 0,
        num_steps=reached.num_steps if reached else 0,
        seconds_left=round(reached.seconds_left, 1) if reached else None,
        seconds=round(now - run.started_monotonic, 1),
        num_images=job.num_images if job else 0,
        attempt=run.attempt,
        adapters=tuple(adapter.ref.shown_key for adapter in job.adapters) if job else (),
        is_cancelled=run.is_cancelled,
        prompt=job.prompt if job and shows_prompts else None,
        preview=f"{PREVIEW_FOLDER}{run.task_id}.jpg?step={preview.step_index}" if preview and shows_prompts else None,
    )


def strip_details(reason: str) -> str:
    """Return a reason up to its colon: the rest may name an image's object, and only `/health/ready` has it. Pure."""
    return reason.partition(":")[0]
