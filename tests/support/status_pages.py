"""A made-up worker's status, and the page that shows it, for looking at every state without a worker."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from prometheus_client import CollectorRegistry

from worker.jobs.history import EndedJob, StageTime
from worker.last_hour import HourSummary
from worker.monitoring.http_server import HealthServer
from worker.monitoring.status import (
    BatchStatus,
    CacheStatus,
    GpuStatus,
    IdleStatus,
    JobStatus,
    ModelStatus,
    QueueStatus,
    SlotsStatus,
    Status,
    WebhooksStatus,
    WorkerStatus,
)

STAGES = ("ledger", "fetch", "wait", "adapt", "encode", "denoise", "decode", "sign", "store", "record", "notify")
SECONDS = (0.012, 0.31, 0.84, 0.021, 0.055, 4.9, 0.42, 0.03, 0.09, 0.02, 0.04)


def job(number: int, **changes: Any) -> JobStatus:
    made = JobStatus(
        generation_id=str(48210 + number),
        task_id=f"660f9511-f3ac-52e5-b827-{number:012d}",
        phase="denoise",
        step_index=4 * number % 30,
        num_steps=30,
        seconds_left=round((30 - 4 * number % 30) * 0.21, 1),
        seconds=2.5 + number,
        num_images=1,
        attempt=1,
        adapters=(f"models/style-{number}/lora_weights.safetensors",),
        is_cancelled=False,
        prompt=None,
        preview=None,
    )
    return replace(made, **changes)


def ended(number: int, **changes: Any) -> EndedJob:
    stages = tuple(
        StageTime(name, round(took * (1 + 0.13 * (number * 7 % 5)), 4))
        for name, took in zip(STAGES, SECONDS, strict=True)
    )
    made = EndedJob(
        generation_id=str(48200 - number),
        task_id=f"770f9511-f3ac-52e5-b827-{number:012d}",
        outcome="complete",
        code="",
        message="",
        finished_at=time.time() - 3 - 11 * number,
        seconds=round(sum(stage.seconds for stage in stages), 3),
        stages=stages,
        num_steps=30,
        num_images=1,
        attempt=1,
        waited_seconds=3.2,
        prompt=None,
        result_urls=(),
        thumbnail=None,
    )
    return replace(made, **changes)


def failed(number: int, code: str, message: str) -> EndedJob:
    stages = (StageTime("ledger", 0.014), StageTime("fetch", 2.2), StageTime("record", 0.02), StageTime("notify", 0.03))
    return ended(number, outcome="failed", code=code, message=message, stages=stages, seconds=2.264, num_steps=None)


def hour(**changes: Any) -> HourSummary:
    """Build the last hour of a worker that has been busier lately."""
    complete = tuple(8 + minute // 6 + minute * 7 % 5 for minute in range(60))
    made = HourSummary(
        jobs_per_minute=19.4,
        seconds_p50=7.61,
        seconds_p95=10.2,
        waited_p50=3.2,
        waited_p95=41.0,
        complete=complete,
        failed=tuple(int(minute % 17 == 3) for minute in range(60)),
        seconds=tuple(None if minute == 20 else 6 + minute * 3 % 7 / 2 for minute in range(60)),
        waiting=tuple(max(0, minute - 30 + minute * 11 % 9) for minute in range(60)),
    )
    return replace(made, **changes)


def status(**changes: Any) -> Status:
    """Build the status of a busy worker."""
    queue = "image_generation"
    depths = {"": 14, "recover": 0, "outbox": 2, "dead": 1, "retry.30": 1, "retry.300": 0, "lease": 0}
    made = Status(
        at=time.time(),
        headline="Drawing 5 images",
        worker=WorkerStatus("gpu-7f6c9:17", "0.1.0", time.time() - 5400, 5400.0, ""),
        model=ModelStatus("stable-diffusion-v1-5", "sd", "cuda:0", "bfloat16", 512, 4.2, 0.031, 0.207),
        jobs=(*(job(number) for number in range(1, 6)), job(6, phase="fetch", step_index=0, num_steps=0)),
        batch=BatchStatus(5, 10, 18240, 4.37, 5.92),
        slots=SlotsStatus(active=5, idle=7, free=4),
        cache=CacheStatus(8_400_000_000, 20_000_000_000),
        gpu=GpuStatus(11_300_000_000, 24_000_000_000, 0.93),
        queues=tuple(
            QueueStatus(f"{queue}.{role}" if role else queue, role or "jobs", depth) for role, depth in depths.items()
        ),
        webhooks=WebhooksStatus(2, ("complete",)),
        outcomes={"complete": 1284, "failed": 17, "cancelled": 2, "retried": 3},
        engine_restarts=1,
        idle=IdleStatus(
            None,
            3890.0,
            {"no_jobs": 1120.0, "fetching": 140.0, "encoding": 60.0, "decoding": 95.0, "engine_starting": 30.0},
        ),
        last_hour=hour(),
        last_jobs=(
            ended(0),
            failed(1, "LORA_NOT_FOUND", "the adapter s3://media/models/style-9.safetensors does not exist"),
            *(ended(number) for number in range(2, 9)),
            ended(9, outcome="retried", code="ENGINE_ERROR", message="the engine failed 1 times", attempt=1),
            ended(10, outcome="cancelled", code="CANCELLED", message="the job was cancelled"),
            *(ended(number) for number in range(11, 14)),
        ),
    )
    return replace(made, **changes)


@contextmanager
def served(read: Callable[[], Status], read_image: Callable[[str], bytes | None] = lambda _: None) -> Iterator[str]:
    """Serve the page of a worker with the status of `read` and its images by their relative URL; yield its address."""
    server = HealthServer(0, CollectorRegistry(), lambda: "", read, read_image)
    server.start()
    try:
        yield f"http://127.0.0.1:{server.port}/"
    finally:
        server.close()
