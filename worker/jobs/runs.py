"""The registry of the jobs that run here, each with its deliveries."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple

from inference.request import GenerationResult, Stage
from worker.amqp.delivery import Delivery, Origin
from worker.jobs.disposition import MAX_ATTEMPTS
from worker.messages.generation_id import GenerationId
from worker.messages.identity import check_same, fingerprint
from worker.messages.job import Job, JobRejected
from worker.tracing.context import TraceContext


class Phase(StrEnum):
    """What a run spends its time on, as stages, metrics and the status page name it."""

    NONE = ""
    LEDGER = "ledger"
    FETCH = "fetch"
    WAIT = "wait"
    ADAPT = "adapt"
    ENCODE = "encode"
    DENOISE = "denoise"
    DECODE = "decode"
    CUT = "cut"
    COMPOSE = "compose"
    SIGN = "sign"
    STORE = "store"
    RECORD = "record"
    NOTIFY = "notify"


class DenoiseProgress(NamedTuple):
    """Denoise steps done of a job, and the estimated seconds of the rest."""

    step_index: int
    num_steps: int
    seconds_left: float


@dataclass(slots=True)
class Run:
    """One job in progress. Its job thread owns it; other threads read `phase`, `progress` and `future`.

    `decoded` is the job, or the rejection that it will fail with, and came by `first`. `deliveries` grows when the
    broker delivers the same task again (a lost connection, a double click), and is empty while the job is on lease;
    all of them are settled together. `started_unix` is in epoch seconds, `started_monotonic` is `time.monotonic()`.
    `thumbnail` is a JPEG of the first finished image, where the status page may show it. `trace` is what the job's
    webhooks are told.
    """

    task_id: str
    generation_id: GenerationId
    decoded: Job | JobRejected
    deliveries: list[Delivery]
    first: Delivery = field(init=False)
    started_monotonic: float = field(default_factory=time.monotonic)
    started_unix: float = field(default_factory=time.time)
    stages: list[Stage] = field(default_factory=list)
    phase: Phase = Phase.NONE
    progress: DenoiseProgress | None = None
    future: Future[GenerationResult] | None = None
    is_cancelled: bool = False
    thumbnail: bytes | None = None
    lease_ends_at: float = 0.0
    trace: TraceContext = field(init=False)
    _entered: list[tuple[Phase, float]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.first = self.deliveries[0]
        self.trace = self.first.origin.trace

    def cancel(self) -> None:
        """Cancel the job as its backend requested: a waiting one before it starts, a running one at its next step."""
        self.is_cancelled = True
        if self.future is not None:
            self.future.cancel()

    @property
    def attempt(self) -> int:
        """Number of the try, from 1."""
        # No worker counts further: a publisher wrote it.
        return self.first.attempt if self.first.attempt <= MAX_ATTEMPTS else 1

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the message, see `worker.messages.identity`."""
        return fingerprint(self.first.body)

    @property
    def origin(self) -> Origin:
        """Origin for copies of the message: with the publisher's context, so that attempts are siblings, else ours."""
        origin = self.first.origin
        return origin._replace(trace=origin.trace or self.trace)

    @property
    def now(self) -> float:
        """Current time in epoch seconds, counted from the run's start: the wall clock may have been set since then."""
        return round(self.started_unix + time.monotonic() - self.started_monotonic, 4)

    @property
    def seconds(self) -> float:
        """Seconds since the job was delivered here, of which the stages account for most."""
        return round(time.monotonic() - self.started_monotonic, 3)

    @property
    def waited_seconds(self) -> float | None:
        """Seconds from the job's `created_at` to its delivery; None without one."""
        job = self.decoded
        # A time without a zone may be hours off, which a histogram and its alerts would take for waiting.
        if not isinstance(job, Job) or job.created_at is None or job.created_at.tzinfo is None:
            return None
        return max(0.0, self.started_unix - job.created_at.timestamp())

    @property
    def num_recoveries(self) -> int:
        """Number of workers that were killed while they ran the job, by the counts in its messages."""
        return max(delivery.num_recoveries for delivery in (self.first, *self.deliveries))

    @contextmanager
    def stage(self, phase: Phase) -> Iterator[None]:
        """Account the block's time to a stage named after `phase`."""
        started_at = time.monotonic()
        self.phase = phase
        try:
            yield
        finally:
            self.stages.append(Stage(phase, started_at, time.monotonic() - started_at))

    def enter_phase(self, phase: Phase) -> None:
        """Record the phase that the engine is in. Any thread may call it."""
        if not self._entered or self._entered[-1][0] != phase:
            self._entered.append((phase, time.monotonic()))
        self.phase = phase

    @contextmanager
    def inside_engine(self) -> Iterator[None]:
        """Account the block's time: by the engine's own stages where they are added, else by the phases it entered.

        The engine's stages come with its result, and a request that is cancelled, fails or is released has none.
        """
        num_before = len(self.stages)
        self._entered = []
        self.enter_phase(Phase.WAIT)
        try:
            yield
        finally:
            if len(self.stages) == num_before:
                entered = self._entered.copy()
                ends = [at for _, at in entered[1:]] + [time.monotonic()]
                self.stages += [Stage(phase, at, end - at) for (phase, at), end in zip(entered, ends, strict=True)]

    def add_engine_stages(self, stages: tuple[Stage, ...]) -> None:
        """Append the engine's stages after a `wait` stage that covers all the waiting since the run's last own stage.

        Part of the wait was between `adapt` and `encode`, where loaded adapters wait for a lane. `adapt` is shown after
        it, so that the stages follow one another without gaps and add up to the time that has passed.
        """
        since = self.stages[-1].started_at + self.stages[-1].seconds
        adapt, encode, *others = stages
        waited = max(0.0, encode.started_at - adapt.seconds - since)
        self.stages += [Stage(Phase.WAIT, since, waited), replace(adapt, started_at=since + waited), encode, *others]

    def timeline(self) -> tuple[tuple[str, float, float], ...]:
        """Return each stage's name, its start in seconds after the run's, and its seconds."""
        return tuple(
            (stage.name, round(stage.started_at - self.started_monotonic, 4), round(stage.seconds, 4))
            for stage in self.stages
        )


class Runs:
    """Registry of the runs by task id, one for each task. Thread-safe. `num_begun` counts all that ever were."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: dict[str, Run] = {}
        self.num_begun = 0

    def attach_or_start(self, decoded: Job | JobRejected, delivery: Delivery) -> Run | None:
        """Return a new run for the job, or None where the task has one: the delivery is then attached to it.

        Raises `TaskIdTaken` where the run under that id is another generation's.
        """
        with self._lock:
            known = self._runs.get(decoded.task_id)
            if known is not None:
                if delivery.body != known.first.body:
                    check_same(decoded, delivery.body, known.generation_id, known.fingerprint)
                known.deliveries.append(delivery)
                return None
            run = Run(decoded.task_id, decoded.generation_id, decoded, [delivery])
            self._runs[decoded.task_id] = run
            self.num_begun += 1
            return run

    def has_copy_of(self, task_id: str, delivery: Delivery) -> bool:
        """Return whether the task's run holds a copy of the message from the same queue and session with at least as
        many crashes: that one is settled with the run, so that this one is not needed."""
        with self._lock:
            known = self._runs.get(task_id)
            return known is not None and any(
                (one.session, one.queue, one.body) == (delivery.session, delivery.queue, delivery.body)
                and one.num_recoveries >= delivery.num_recoveries
                for one in known.deliveries
            )

    def detach_deliveries(self, run: Run) -> list[Delivery]:
        """Remove and return the deliveries of a run that has not finished; the caller settles them."""
        with self._lock:
            if run.task_id not in self._runs:
                return []
            deliveries, run.deliveries = run.deliveries, []
            return deliveries

    def finish(self, run: Run) -> list[Delivery]:
        """Remove the run and return its deliveries, which the caller settles."""
        with self._lock:
            del self._runs[run.task_id]
            return run.deliveries

    def all(self) -> list[Run]:
        """Return the runs of this moment."""
        with self._lock:
            return list(self._runs.values())

    def __contains__(self, task_id: str) -> bool:
        with self._lock:
            return task_id in self._runs
