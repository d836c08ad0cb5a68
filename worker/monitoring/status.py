"""What a worker is doing at one moment, as the status page shows it: frozen, without secrets, and JSON in the end."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from worker.jobs.history import EndedJob
from worker.jobs.runs import Run
from worker.messages.job import Job
from worker.progress.previews import ShownPreview

# Where the worker serves previews; the page's address goes before it.
PREVIEW_FOLDER = "status/preview/"


@dataclass(frozen=True, slots=True)
class WorkerNow:
    """The process: `name` is host and process id, `why_not_ready` is empty once it takes jobs."""

    name: str
    version: str
    started_at: float
    uptime_seconds: float
    why_not_ready: str


@dataclass(frozen=True, slots=True)
class ModelNow:
    """The loaded model. `step_seconds` was measured by the warm-up; `recent_step_seconds` is what jobs' steps take,
    however many share them."""

    model: str
    family: str
    device: str
    dtype: str
    base_size: int
    load_seconds: float
    step_seconds: float
    recent_step_seconds: float


@dataclass(frozen=True, slots=True)
class JobNow:
    """A job at work. `generation_id` is text, as JavaScript cannot hold all of its numbers; the steps are 0 of 0 before
    denoising, and `seconds_left` is the estimate for those to come. `prompt` is None unless it may be shown, and so is
    `preview`, the address of the newest one at this worker."""

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
class BatchNow:
    """The lanes, and how many of them shared a forward: since the start and lately, 0 where there was none lately."""

    num_lanes: int
    max_lanes: int
    num_steps: int
    mean: float
    recent: float


@dataclass(frozen=True, slots=True)
class SlotsNow:
    """Adapter slots by state."""

    active: int
    idle: int
    free: int


@dataclass(frozen=True, slots=True)
class CacheNow:
    """The download cache."""

    size_bytes: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class GpuNow:
    """The GPU's memory and how busy it is, 0 to 1."""

    memory_used_bytes: int
    memory_total_bytes: int
    utilization_ratio: float


@dataclass(frozen=True, slots=True)
class QueueNow:
    """A queue and its ready messages; `role` is what it is for: `jobs`, `retry.30`, `dead` …"""

    name: str
    role: str
    num_messages: int


@dataclass(frozen=True, slots=True)
class WebhooksNow:
    """Ends that the backend has not taken yet, and the kinds of webhook that it did not take of late."""

    num_waiting: int
    failing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class IdleNow:
    """What the GPU does: `reason` it is idle, None while something is denoised; and seconds since the start."""

    reason: str | None
    denoising_seconds: float
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Status:
    """All of it at one moment, `at` in epoch seconds. Jobs at work come the oldest first, ended ones the newest."""

    at: float
    worker: WorkerNow
    model: ModelNow | None
    jobs: tuple[JobNow, ...]
    batch: BatchNow
    slots: SlotsNow
    cache: CacheNow
    gpu: GpuNow | None
    queues: tuple[QueueNow, ...]
    webhooks: WebhooksNow
    outcomes: Mapping[str, int]
    engine_restarts: int
    idle: IdleNow
    last_jobs: tuple[EndedJob, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), allow_nan=False)


def job_now(run: Run, now: float, *, shows_prompts: bool, preview: ShownPreview | None) -> JobNow:
    """What is shown of a job at work; `now` is `time.monotonic()`. Pure."""
    job = run.decoded if isinstance(run.decoded, Job) else None
    reached = run.progress
    return JobNow(
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


def without_details(reason: str) -> str:
    """A reason up to what a part answered, which may name a picture's object: `/health/ready` has the rest. Pure."""
    return reason.partition(":")[0]
