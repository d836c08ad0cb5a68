"""The jobs at work here, and the deliveries that asked for each of them."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from inference.request import GenerationResult, Stage
from worker.amqp.delivery import Delivery
from worker.jobs.disposition import MAX_ATTEMPTS
from worker.messages.generation_id import GenerationId
from worker.messages.identity import check_same, fingerprint
from worker.messages.job import Job, JobRejected


class Reached(NamedTuple):
    """How far a job's denoising is, and the estimate of what is left of it."""

    step_index: int
    num_steps: int
    seconds_left: float


@dataclass(slots=True)
class Run:
    """One job being worked on. Its job thread owns it; `phase`, `reached` and `future` are read by others.

    `asked` is the job, or the rejection that will be its end; it came by `first`. `deliveries` grows when the broker
    delivers the same task again (a lost connection, a double click), and is empty while the job is on lease; all of
    them are settled together.
    """

    task_id: str
    generation_id: GenerationId
    asked: Job | JobRejected
    deliveries: list[Delivery]
    first: Delivery = field(init=False)
    started_at: float = field(default_factory=time.monotonic)
    began_at: float = field(default_factory=time.time)
    stages: list[Stage] = field(default_factory=list)
    phase: str = ""
    reached: Reached | None = None
    future: Future[GenerationResult] | None = None
    is_cancelled: bool = False
    lease_ends_at: float = 0.0
    _entered: list[tuple[str, float]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.first = self.deliveries[0]

    def cancel(self) -> None:
        """They asked: a waiting job ends before it starts, a running one at its next step."""
        self.is_cancelled = True
        if self.future is not None:
            self.future.cancel()

    @property
    def attempt(self) -> int:
        # Nobody here counts further: a publisher wrote it.
        return self.first.attempt if self.first.attempt <= MAX_ATTEMPTS else 1

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.first.body)

    @property
    def now(self) -> float:
        """Now, in epoch seconds, counted from the run's beginning: the wall clock may have been set meanwhile."""
        return round(self.began_at + time.monotonic() - self.started_at, 4)

    @property
    def seconds(self) -> float:
        """Since the job was delivered here. Stages account for most of it, and for no more than what they enclose."""
        return round(time.monotonic() - self.started_at, 3)

    @property
    def num_recoveries(self) -> int:
        """How many workers were killed with the job before, as its messages tell."""
        return max(delivery.num_recoveries for delivery in (self.first, *self.deliveries))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Account the block's time to stage `name`."""
        started_at = time.monotonic()
        self.phase = name
        try:
            yield
        finally:
            self.stages.append(Stage(name, started_at, time.monotonic() - started_at))

    def enter(self, phase: str) -> None:
        """Note the phase that the engine is in. Any thread may call it."""
        if not self._entered or self._entered[-1][0] != phase:
            self._entered.append((phase, time.monotonic()))
        self.phase = phase

    @contextmanager
    def inside_engine(self) -> Iterator[None]:
        """Account the block's time: by the engine's own stages where it adds them, else by the phases it entered.

        The engine times its stages in its result, and a request that is cancelled, fails or is given back has none.
        """
        num_before = len(self.stages)
        self._entered = []
        self.enter("wait")
        try:
            yield
        finally:
            if len(self.stages) == num_before:
                self.stages += self._stages_of_phases()

    def _stages_of_phases(self) -> list[Stage]:
        entered = self._entered.copy()
        ends = [at for _, at in entered[1:]] + [time.monotonic()]
        return [Stage(phase, at, end - at) for (phase, at), end in zip(entered, ends, strict=True)]

    def add_engine_stages(self, stages: tuple[Stage, ...]) -> None:
        """Account the engine's time, behind one stage more: all the waiting since the run's last own stage.

        Part of it lay between `adapt` and `encode`, where loaded adapters wait for a lane. `adapt` is shown behind it
        all, so that the stages follow one another without gaps and add up to the time that has passed.
        """
        since = self.stages[-1].started_at + self.stages[-1].seconds
        adapt, encode, *others = stages
        waited = max(0.0, encode.started_at - adapt.seconds - since)
        self.stages += [Stage("wait", since, waited), replace(adapt, started_at=since + waited), encode, *others]

    def timeline(self) -> tuple[tuple[str, float, float], ...]:
        """Each stage's name, its start in seconds after the run's, and its seconds."""
        return tuple(
            (stage.name, round(stage.started_at - self.started_at, 4), round(stage.seconds, 4)) for stage in self.stages
        )


class Runs:
    """Registry of the runs by task id. Thread-safe; a task is here once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: dict[str, Run] = {}

    def join(self, asked: Job | JobRejected, delivery: Delivery) -> Run | None:
        """A new run for the job, or None if one is at work already: then it has adopted the delivery.

        Raises `TaskIdTaken` where the run that is at work under the id is another generation's.
        """
        with self._lock:
            known = self._runs.get(asked.task_id)
            if known is not None:
                if delivery.body != known.first.body:
                    check_same(asked, delivery.body, known.generation_id, known.fingerprint)
                known.deliveries.append(delivery)
                return None
            run = Run(asked.task_id, asked.generation_id, asked, [delivery])
            self._runs[asked.task_id] = run
            return run

    def has_copy_of(self, task_id: str, delivery: Delivery) -> bool:
        """Whether the run holds another copy of the message, out of the same queue and session and with no fewer
        crashes: it is settled with the run, so that this one is not needed."""
        with self._lock:
            known = self._runs.get(task_id)
            return known is not None and any(
                (one.session, one.queue, one.body) == (delivery.session, delivery.queue, delivery.body)
                and one.num_recoveries >= delivery.num_recoveries
                for one in known.deliveries
            )

    def part_from_deliveries(self, run: Run) -> list[Delivery]:
        """Take a run's deliveries out of its hands, if it is still here; the caller settles them."""
        with self._lock:
            if run.task_id not in self._runs:
                return []
            deliveries, run.deliveries = run.deliveries, []
            return deliveries

    def leave(self, run: Run) -> list[Delivery]:
        """Take the run out and return every delivery that must now be settled with it."""
        with self._lock:
            del self._runs[run.task_id]
            return run.deliveries

    def all(self) -> list[Run]:
        with self._lock:
            return list(self._runs.values())

    def __contains__(self, task_id: str) -> bool:
        with self._lock:
            return task_id in self._runs
