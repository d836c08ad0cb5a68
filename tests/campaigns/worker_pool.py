"""A pool of workers, which starts a new one wherever one ends, as Docker would."""

import os
import random
import re
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import requests

from examples.parts.ports import free_port
from tests.campaigns.journal import Counted, Ended, Journal
from tests.support.world import Worker, World

# A kill may hide what was counted since the last look.
LOOK_SECONDS = 0.25

_LANE_STEPS = re.compile(r"^darkroom_denoise_lane_steps_total (\S+)$", re.MULTILINE)
_IDLE_SECONDS = re.compile(r'^darkroom_idle_seconds_total\{reason="no_jobs"\} (\S+)$', re.MULTILINE)


@dataclass
class WorkerSlot:
    """Where one worker runs after another, with one cache on disk for all of them."""

    number: int
    worker: Worker
    life: int
    stopped_by: str = ""
    stopped_at: float = field(default_factory=time.time)
    was_ready: bool = False
    num_lane_steps: float = -1.0


class WorkerPool:
    """Owner of the workers and of the thread that looks after them. Public methods may be called from any thread."""

    def __init__(self, world: World, journal: Journal, *, num_workers: int, env: Mapping[str, str]) -> None:
        self._world = world
        self._journal = journal
        self._env = dict(env)
        self._lock = threading.Lock()
        self._is_closing = threading.Event()
        self._num_lives = max((counted.life for counted in journal.all(Counted)), default=0)
        self._slots = [self._occupy(number) for number in range(1, num_workers + 1)]
        self._thread = threading.Thread(target=self._run, name="worker-pool", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def num_ready(self) -> int:
        """Workers that have been ready in their present life and were sent no signal."""
        return sum(slot.was_ready and not slot.stopped_by for slot in self._slots)

    @property
    def num_lives(self) -> int:
        return self._num_lives

    def kill_a_worker(self, rng: random.Random) -> str | None:
        """Send SIGKILL to a supervisor; return whose, or None where none can be had at the moment."""
        return self._signal(rng, signal.SIGKILL, "kill")

    def stop_a_worker(self, rng: random.Random) -> str | None:
        """Send SIGTERM to a supervisor; return whose, or None where none can be had at the moment."""
        return self._signal(rng, signal.SIGTERM, "sigterm")

    def kill_an_engine(self, rng: random.Random) -> str | None:
        """Send SIGKILL to the engine of a worker; return whose, or None where there is none at the moment."""
        with self._lock:
            slot = rng.choice(self._slots)
            try:
                os.kill(slot.worker.engine_pid(), signal.SIGKILL)
            except (OSError, IndexError):
                return None
            return f"worker {slot.life}"

    def close(self) -> None:
        """Take a last count, and end every worker. Harmless where it was done already."""
        self._is_closing.set()
        self._thread.join()
        for slot in self._slots:
            self._count(slot)
            slot.worker.kill()

    def _signal(self, rng: random.Random, number: signal.Signals, word: str) -> str | None:
        with self._lock:
            candidates = [slot for slot in self._slots if not slot.stopped_by and slot.worker.process.poll() is None]
            if not candidates:
                return None
            slot = rng.choice(candidates)
            slot.stopped_by, slot.stopped_at = word, time.time()
            slot.worker.process.send_signal(number)
            return f"worker {slot.life}"

    def _run(self) -> None:
        while not self._is_closing.wait(LOOK_SECONDS):
            for index, slot in enumerate(self._slots):
                if slot.worker.process.poll() is None:
                    self._count(slot)
                    continue
                self._note_end(slot)
                with self._lock:
                    self._slots[index] = self._occupy(slot.number)

    def _occupy(self, number: int) -> WorkerSlot:
        self._num_lives += 1
        own = {"CACHE_DIR": str(self._world.folder / f"cache-{number}"), "METRICS_PORT": str(free_port())}
        log = self._world.folder / f"worker-{self._num_lives}.log"
        worker = Worker(self._world.env() | own | self._env, log)
        self._world.workers.append(worker)
        # Without an entry a campaign that goes on would give the number a second time.
        self._journal.write(Counted(time.time(), self._num_lives, 0.0, 0.0))
        return WorkerSlot(number, worker, self._num_lives)

    def _note_end(self, slot: WorkerSlot) -> None:
        seconds = time.time() - slot.stopped_at if slot.stopped_by else 0.0
        exit_code = slot.worker.process.returncode
        self._journal.write(
            Ended(time.time(), slot.life, exit_code, slot.stopped_by, round(seconds, 2), was_ready=slot.was_ready)
        )

    def _count(self, slot: WorkerSlot) -> None:
        """Journal the worker's counters where they have moved."""
        with suppress(requests.RequestException):
            text = slot.worker.get("/metrics")[1]
            slot.was_ready = slot.was_ready or slot.worker.get("/health/ready")[0] == 200
            steps, idle = _sample(_LANE_STEPS, text), _sample(_IDLE_SECONDS, text)
            if text and steps != slot.num_lane_steps:
                slot.num_lane_steps = steps
                self._journal.write(Counted(time.time(), slot.life, steps, idle))


def _sample(pattern: re.Pattern[str], text: str) -> float:
    found = pattern.search(text)
    return float(found[1]) if found else 0.0
