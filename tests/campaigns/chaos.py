"""What goes wrong in a campaign, one thing at a time, at random moments."""

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from examples.parts.processes import ServerError
from tests.campaigns.journal import Acted, Journal
from tests.campaigns.worker_pool import WorkerPool
from tests.faults.proxy import Proxy
from tests.support.world import World

RETRY_SECONDS = 0.3
# How far the chaos may run ahead of the jobs, as a share of both: workers that are killed faster than they start
# would get nothing done.
LEAD = 0.1


@dataclass(frozen=True)
class ChaosTargets:
    """What there is to break, and how often each thing was; a proxy goes by the name of the part behind it."""

    world: World
    pool: WorkerPool
    proxies: Mapping[str, Proxy]
    num_done: Counter[str]


Act = Callable[[ChaosTargets, random.Random], str | None]


@dataclass(frozen=True)
class FaultSchedule:
    """One kind of chaos: after `gap_seconds` (from, to) it strikes again, `times` in all or as long as jobs flow.

    `act` returns what it did, or None where there was nothing to do it to: then it is tried again at once.
    """

    name: str
    act: Act
    gap_seconds: tuple[float, float]
    times: int | None = None


def kill_something(targets: ChaosTargets, rng: random.Random) -> str | None:
    """Send SIGKILL to a supervisor or an engine, evenly."""
    if rng.random() < 0.5:
        done = targets.pool.kill_a_worker(rng)
        return done and f"supervisor of {done}"
    done = targets.pool.kill_an_engine(rng)
    return done and f"engine of {done}"


def stop_a_worker(targets: ChaosTargets, rng: random.Random) -> str | None:
    return targets.pool.stop_a_worker(rng)


def close_connections(targets: ChaosTargets, _rng: random.Random) -> str:
    targets.world.rabbitmq.close_connections()
    return "all"


def reset_connections(targets: ChaosTargets, rng: random.Random) -> str:
    """Send RST to all connections of the workers to one of the parts, most often the broker."""
    name = rng.choice(("broker", "broker", "store", "backend"))
    targets.proxies[name].reset()
    return name


def restart_broker(targets: ChaosTargets, _rng: random.Random) -> str:
    """Restart the broker in order and by SIGKILL, in turn."""
    is_orderly = targets.num_done["broker restart"] % 2 == 0
    rabbitmq = targets.world.rabbitmq
    if is_orderly:
        rabbitmq.stop()
    else:
        rabbitmq.kill()
    rabbitmq.start()
    return "in order" if is_orderly else "killed"


def pause_store(targets: ChaosTargets, rng: random.Random) -> str:
    """Send SIGSTOP for some seconds: the store accepts connections and answers nothing."""
    seconds = rng.uniform(0.5, 5.0)
    os.killpg(targets.world.store.pid, signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        os.killpg(targets.world.store.pid, signal.SIGCONT)
    return f"{seconds:.1f} s"


def restart_store(targets: ChaosTargets, _rng: random.Random) -> str:
    targets.world.store.kill()
    targets.world.store.start()
    return "killed"


def backend_outage(seconds: float) -> Act:
    """Make the backend refuse connections for a while."""

    def act(targets: ChaosTargets, _rng: random.Random) -> str:
        targets.world.backend.stop()
        time.sleep(seconds)
        targets.world.backend.start()
        return f"{seconds:.0f} s"

    return act


class Chaos:
    """Owner of the thread on which things go wrong; one after another, as the parts are not thread-safe."""

    def __init__(
        self,
        schedules: tuple[FaultSchedule, ...],
        targets: ChaosTargets,
        journal: Journal,
        *,
        seed: int,
        share_ended: Callable[[], float],
    ) -> None:
        self._schedules = schedules
        self._targets = targets
        self._journal = journal
        self._rng = random.Random(seed)
        self._share_ended = share_ended
        self._is_closing = threading.Event()
        self._due_at = {
            schedule.name: time.monotonic() + self._rng.uniform(*schedule.gap_seconds) for schedule in schedules
        }
        self._thread = threading.Thread(target=self._run, name="chaos", daemon=True)
        self.failure: BaseException | None = None

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Break nothing more; what was being broken is whole again."""
        self._is_closing.set()
        self._thread.join()

    @property
    def is_over(self) -> bool:
        """Whether everything has struck as often as it should."""
        return all(self._num_left(schedule) == 0 for schedule in self._schedules if schedule.times is not None)

    @property
    def summary(self) -> str:
        """How often everything has struck, for the eye."""
        return ", ".join(f"{name} {count}" for name, count in sorted(self._targets.num_done.items()))

    @property
    def share_done(self) -> float:
        """The share of its times that the slowest schedule has struck."""
        return min((self._share(schedule) for schedule in self._schedules if schedule.times is not None), default=1.0)

    def _run(self) -> None:
        try:
            while not self._is_closing.wait(RETRY_SECONDS / 3):
                for schedule in self._schedules:
                    if self._is_due(schedule) and not self._is_closing.is_set():
                        self._strike(schedule)
        except (OSError, ServerError, AssertionError) as error:
            self.failure = error

    def _is_due(self, schedule: FaultSchedule) -> bool:
        if time.monotonic() < self._due_at[schedule.name]:
            return False
        if schedule.times is None:
            return True
        return self._num_left(schedule) > 0 and self._share(schedule) <= self._share_ended() + LEAD

    def _strike(self, schedule: FaultSchedule) -> None:
        detail = schedule.act(self._targets, self._rng)
        if detail is None:
            self._due_at[schedule.name] = time.monotonic() + RETRY_SECONDS
            return
        self._due_at[schedule.name] = time.monotonic() + self._rng.uniform(*schedule.gap_seconds)
        self._targets.num_done[schedule.name] += 1
        self._journal.write(Acted(time.time(), schedule.name, detail))

    def _num_left(self, schedule: FaultSchedule) -> int:
        return max(0, (schedule.times or 0) - self._targets.num_done[schedule.name])

    def _share(self, schedule: FaultSchedule) -> float:
        return self._targets.num_done[schedule.name] / schedule.times if schedule.times else 1.0
