"""Hundreds of jobs with many more adapters than slots: memory stays flat, and no adapter leaks into another's picture.

`make leaks` runs 300 jobs with 40 adapters. What the adapters of few jobs leave behind in an engine is shown, without a
look at memory, by `tests/inference/engine/test_batching.py` and `tests/live/drawing/test_jobs.py`.
"""

import hashlib
import logging
import os
import statistics
from collections.abc import Iterator

import psutil
import pytest

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.support.long import long
from tests.support.models.tiny_models import load_pipe, write_adapter
from tests.support.paths import DEMO_MODEL
from tests.support.world import Worker, World, eventually, new_world

logger = logging.getLogger(__name__)

NUM_JOBS = int(os.environ.get("LEAK_JOBS", "40"))
NUM_ADAPTERS = min(40, NUM_JOBS // 3)
NUM_SLOTS = 8
NUM_LANES = "4"  # a batch's size, and with it the memory of a step, must not depend on chance
ROUND = 10 if NUM_JOBS < 200 else 20  # jobs between two looks at the memory
WARM_ROUNDS = 3 if NUM_JOBS >= 200 else 1  # caches, the bank and the allocator come to their size
MAX_MB_PER_JOB = 0.2
# The short form has few points, and an allocator's arena is larger than a job: 27 MB came in one round, and went later.
TOLERANCE_MB = 30.0
STEPS = 4


@pytest.fixture(scope="module")
def world(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with new_world(rabbitmq, s3_server, tmp_path_factory.mktemp("world")) as made:
        yield made


@pytest.fixture(scope="module")
def adapters(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Upload adapters of several ranks and layers."""
    folder = tmp_path_factory.mktemp("adapters")
    pipe = load_pipe(DEMO_MODEL / "checkpoint")
    keys = []
    for number in range(NUM_ADAPTERS):
        rank, has_text = (4, 8, 16, 24)[number % 4], number % 5 == 0
        path = folder / f"{number}.safetensors"
        write_adapter(path, pipe, layout="diffusers_new", rank=rank, seed=number, text_encoder=has_text)
        keys.append(world.upload(f"models/{path.name}", path.read_bytes()))
    return keys


def control_hash(world: World, adapter: str | None) -> str:
    """Hash the image of one and the same job, drawn alone: another batch would change its last bits."""
    generation_id = world.publish(prompt="a lighthouse", seed=7, num_inference_steps=STEPS, lora_path=adapter)
    assert world.wait_for_end(generation_id).kind == "complete"
    return hashlib.sha256(world.image(generation_id).tobytes()).hexdigest()


def resident_mb(worker: Worker) -> tuple[float, float]:
    """Return the resident memory of the supervisor and of the engine."""
    return tuple(psutil.Process(pid).memory_info().rss / 1e6 for pid in (worker.process.pid, worker.engine_pid()))  # type: ignore[return-value]


def slots_of(worker: Worker) -> dict[str, float]:
    return {state: worker.metric("darkroom_adapter_slots", state=state) for state in ("active", "idle", "free")}


@long
def test_many_adapters_in_few_slots_leave_no_trace_in_memory_or_images(world: World, adapters: list[str]) -> None:
    worker = world.start_worker(ADAPTER_SLOTS=str(NUM_SLOTS), MAX_CONCURRENT_GENERATIONS=NUM_LANES)
    worker.wait_until_ready()
    controls = [(control_hash(world, None), control_hash(world, adapters[0]))]
    memory: list[tuple[float, float]] = []

    for start in range(0, NUM_JOBS, ROUND):
        jobs = [
            world.publish(num_inference_steps=STEPS, lora_path=adapters[number % NUM_ADAPTERS], seed=number)
            for number in range(start, start + ROUND)
        ]
        assert {world.wait_for_end(job).kind for job in jobs} == {"complete"}
        controls.append((control_hash(world, None), control_hash(world, adapters[0])))
        memory.append(resident_mb(worker))

    assert len(set(controls)) == 1
    assert controls[0][0] != controls[0][1]
    # The gauges follow the last answer.
    settled = {"active": 0, "idle": NUM_SLOTS, "free": 0}
    eventually(lambda: slots_of(worker) == settled, lambda: str(slots_of(worker)))
    assert worker.metric("darkroom_engine_restarts_total") == 0
    jobs_done = [ROUND * (number + 1) for number in range(len(memory))]
    for name, values in zip(("supervisor", "engine"), zip(*memory, strict=True), strict=True):
        slope, _ = statistics.linear_regression(jobs_done[WARM_ROUNDS:], values[WARM_ROUNDS:])
        logger.warning(
            "%s: %.3f MB a job; %s MB after each %d jobs", name, slope, [round(one) for one in values], ROUND
        )
        allowed = MAX_MB_PER_JOB + (0 if NUM_JOBS >= 200 else TOLERANCE_MB / (jobs_done[-1] - jobs_done[WARM_ROUNDS]))
        assert slope < allowed, f"the {name} grows by {slope:.3f} MB a job"
