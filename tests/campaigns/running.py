"""Running a campaign: publish, break, restart workers, and compute the figures."""

import json
import math
import random
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pika
import pika.exceptions
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.campaigns.backend import FlakyBackend
from tests.campaigns.chaos import Chaos, ChaosTargets
from tests.campaigns.figures import Figures, compute_figures
from tests.campaigns.jobs import ADAPTERS, PlannedJob, plan_jobs, poisoned_of
from tests.campaigns.journal import Acted, Began, Journal, Published
from tests.campaigns.leftovers import stored, take_parked, wait_until_settled
from tests.campaigns.plans import Campaign
from tests.campaigns.worker_pool import WorkerPool
from tests.faults.proxy import Proxy
from tests.faults.station import ANY_REQUEST, answers, sometimes, stand_in_env
from tests.support.world import World, eventually

TURN_SECONDS = 0.2
STAND_IN_STEP_SECONDS = 0.02


@dataclass
class CampaignRun:
    """The parts of a running campaign, put together."""

    campaign: Campaign
    began: Began
    journal: Journal
    backend: FlakyBackend
    world: World
    pool: WorkerPool
    chaos: Chaos


def run(
    campaign: Campaign, rabbitmq: RabbitMQ, store: SeaweedFS, folder: Path, *, seed: int, console: Console
) -> Figures:
    """Run the campaign in `folder`, or go on with what an earlier run left there; the parts must be the same ones."""
    with _set_up(campaign, rabbitmq, store, folder, seed) as running:
        jobs = _planned(campaign, running.began.seed)
        poisoned = _poisoned(campaign, running.began.seed)
        _wait_for_a_worker(running)
        running.chaos.start()
        try:
            _work_through(running, jobs, console, num_to_end=len(jobs) - len(poisoned))
        finally:
            running.chaos.close()
        if running.chaos.failure is not None:
            raise running.chaos.failure
        running.backend.heal()
        left = wait_until_settled(running.world, num_parked=len(poisoned))
        running.pool.close()
        parked = take_parked(running.world, num_parked=len(poisoned))
        left[".outbox"] = sum(generation_id not in poisoned for generation_id in parked)
        return compute_figures(
            running.journal.entries(),
            stored(running.world),
            left,
            limits=campaign.limits,
            poisoned=poisoned,
            parked=parked,
        )


def _planned(campaign: Campaign, seed: int) -> list[PlannedJob]:
    return plan_jobs(campaign.num_jobs, seed=seed, steps=campaign.steps)


def _poisoned(campaign: Campaign, seed: int) -> frozenset[int]:
    return poisoned_of(_planned(campaign, seed)) if campaign.has_poison else frozenset()


@contextmanager
def _set_up(campaign: Campaign, rabbitmq: RabbitMQ, store: SeaweedFS, folder: Path, seed: int) -> Iterator[CampaignRun]:
    with ExitStack() as stack:
        journal = Journal(folder / "journal.jsonl")
        stack.callback(journal.close)
        began = _begin(campaign, journal, store, seed)
        backend = FlakyBackend(
            journal,
            mishaps=campaign.mishaps,
            seed=seed,
            read_record=_record_reader(store, began.bucket),
            poisoned=_poisoned(campaign, began.seed),
        )
        stack.enter_context(backend)
        world = World(rabbitmq, store, backend, began.bucket, began.queue, folder)
        for name in ADAPTERS:
            world.upload_demo_adapter(name)
        proxies = _proxies(world) if campaign.has_proxies else {}
        for proxy in proxies.values():
            stack.enter_context(proxy)
        if campaign.store_error_share:
            refuse = sometimes(answers(500), campaign.store_error_share, random.Random(seed))
            proxies["store"].when(ANY_REQUEST, do=refuse, times=None)
        env = _env_through(proxies)
        if not campaign.has_real_engine:
            step = {"tests.support.engine.fake_child:TURN_SECONDS": STAND_IN_STEP_SECONDS}
            env |= stand_in_env(folder / "stand-in.log", step | campaign.constants)
            env |= {"MAX_CONCURRENT_GENERATIONS": "3"}  # so that jobs wait
        env |= campaign.env
        pool = WorkerPool(world, journal, num_workers=campaign.num_workers, env=env)
        pool.start()
        stack.callback(pool.close)
        num_done = Counter(acted.action for acted in journal.all(Acted))
        chaos = Chaos(
            campaign.schedules,
            ChaosTargets(world, pool, proxies, num_done),
            journal,
            seed=seed,
            share_ended=lambda: backend.num_ended / campaign.num_jobs,
        )
        yield CampaignRun(campaign, began, journal, backend, world, pool, chaos)


def _begin(campaign: Campaign, journal: Journal, store: SeaweedFS, seed: int) -> Began:
    """Return how the first run began; this run's beginning is recorded, too."""
    known = journal.all(Began)
    began = known[0] if known else _beginning(campaign, seed)
    if not known:
        store.make_bucket(began.bucket)
    journal.write(began)
    return began


def _beginning(campaign: Campaign, seed: int) -> Began:
    name = f"campaign-{uuid.uuid4().hex[:12]}"
    return Began(
        at=time.time(),
        campaign=campaign.name,
        seed=seed,
        num_jobs=campaign.num_jobs,
        num_actions=campaign.num_actions,
        num_workers=campaign.num_workers,
        has_real_engine=campaign.has_real_engine,
        bucket=name,
        queue=name,
    )


def _proxies(world: World) -> dict[str, Proxy]:
    return {
        "broker": Proxy(world.rabbitmq.port),
        "store": Proxy(world.store.port),
        "backend": Proxy(world.backend.port),
    }


def _env_through(proxies: Mapping[str, Proxy]) -> dict[str, str]:
    """Return the variables that lead a worker through the proxies, where there are any."""
    if not proxies:
        return {}
    return {
        "RABBITMQ_PORT": str(proxies["broker"].port),
        "AWS_S3_ENDPOINT_URL": f"http://{Proxy.host}:{proxies['store'].port}",
        "BACKEND_API_URL": f"http://{Proxy.host}:{proxies['backend'].port}",
    }


def _record_reader(store: SeaweedFS, bucket: str) -> Any:
    client = store.client()

    def read(task_id: str) -> tuple[dict[str, Any], float]:
        """Read a task's record in the ledger and its age in seconds."""
        answer = client.get_object(Bucket=bucket, Key=f"jobs/{task_id}.json")
        age = (datetime.now(UTC) - answer["LastModified"]).total_seconds()
        return json.loads(answer["Body"].read()), age

    return read


def _wait_for_a_worker(running: CampaignRun) -> None:
    eventually(lambda: running.pool.num_ready > 0, running.world.workers[0].log_tail)


def _work_through(running: CampaignRun, jobs: list[PlannedJob], console: Console, *, num_to_end: int) -> None:
    """Publish as the workers and the chaos allow, until so many have ended and all has gone wrong that should."""
    published = {entry.generation_id for entry in running.journal.all(Published)}
    waiting = [job for job in jobs if job.generation_id not in published]
    stall = _StallDetector(running.campaign.patience_seconds)
    with _progress(console) as progress:
        bar = progress.add_task(running.campaign.name, total=len(jobs), done="")
        while waiting or running.backend.num_ended < num_to_end or not running.chaos.is_over:
            num_published = len(jobs) - len(waiting)
            batch = waiting[: max(0, _num_allowed(running) - num_published)]
            if batch and _publish(running, batch):
                waiting = waiting[len(batch) :]
            done = f"{num_published} published, {running.chaos.summary}"
            progress.update(bar, completed=running.backend.num_ended, done=done)
            if running.chaos.failure is not None or stall.is_over((running.backend.num_ended, done)):
                return
            time.sleep(TURN_SECONDS)
        progress.update(bar, completed=running.backend.num_ended)


class _StallDetector:
    """Notices that nothing has changed for too long."""

    def __init__(self, patience_seconds: float) -> None:
        self._patience_seconds = patience_seconds
        self._last: object = None
        self._changed_at = time.monotonic()

    def is_over(self, state: object) -> bool:
        if state != self._last:
            self._last, self._changed_at = state, time.monotonic()
        return time.monotonic() - self._changed_at > self._patience_seconds


def _num_allowed(running: CampaignRun) -> int:
    """Count the jobs that may have been published by now: no more than the chaos is due, so that both end together."""
    num_jobs, depth = running.campaign.num_jobs, running.campaign.depth
    due = math.ceil(num_jobs * running.chaos.share_done) + depth
    return min(num_jobs, due, running.backend.num_ended + depth)


def _publish(running: CampaignRun, jobs: list[PlannedJob]) -> bool:
    """Publish as a careful backend does, each confirmed; False where the broker is not there at the moment."""
    try:
        connection = pika.BlockingConnection(pika.URLParameters(running.world.rabbitmq.url))
        channel = connection.channel()
        channel.confirm_delivery()
        channel.queue_declare(running.world.queue, durable=True)
        for job in jobs:
            properties = pika.BasicProperties(delivery_mode=2)
            channel.basic_publish("", running.world.queue, job.message(running.world.bucket), properties)
        connection.close()
    except (pika.exceptions.AMQPError, OSError):
        return False  # all of them again: the workers know a task they have seen
    for job in jobs:
        running.journal.write(
            Published(
                time.time(),
                job.generation_id,
                job.task_id,
                job.num_images,
                job.num_steps * (job.num_images if running.campaign.has_real_engine else 1),
                must_fail=job.must_fail,
            )
        )
    return True


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    return Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[done]}"), console=console)
