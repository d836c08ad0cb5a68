"""Runs the stages one after another in child processes, each within its time box, and keeps the summary up to date.

This process never touches CUDA, so that children can be forked from it with torch and diffusers imported: that is the
largest fixed cost, and a spawned child would pay it again. A fork is safe only while this process has neither a CUDA
context nor a second thread (the lock it holds, or its OpenMP team, would be gone in the child): where a library has
started one, children are spawned.
"""

import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.child import END, FAILURE, Assignment, run_stage
from benchmarks.gpu.records import drop_torn_line, read_records
from benchmarks.gpu.stages import STAGES, Stage

# What all stages but the first need; imported once, here, while the first one runs.
HEAVY_IMPORTS = ("inference.engine.local_engine", "benchmarks.gpu.models.bench_model")
# Time that is left to a stage beyond its box until this process kills it: the child's own alarm comes first.
ALARM_GRACE_SECONDS = 1.0
# With less of the budget left a stage would be killed while it starts.
LEAST_SECONDS = 3.0
CORRECTNESS = 1


@dataclass(frozen=True)
class StageEnd:
    """How a stage ended: `state` is done, failed, killed or skipped."""

    state: str
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What was asked for. `budget` in seconds for all of it; `started_at` is `time.monotonic()`."""

    out: Path
    budget: float
    device: str
    size: str
    numbers: Sequence[int]
    started_at: float

    @property
    def seconds_left(self) -> float:
        return self.started_at + self.budget - time.monotonic()


class Frame:
    """Owner of the children. `run` is called once for each stage, in order."""

    def __init__(self, plan: Plan, stages: Sequence[Stage] = STAGES) -> None:
        self._plan = plan
        self._needs_libraries = any(one.needs_engine for one in stages if one.number in plan.numbers)

    def run(self, stage: Stage) -> StageEnd:
        """Run the stage if it is wanted and can be of use."""
        reason = self._why_not(stage)
        if reason:
            return StageEnd("skipped", reason)
        if stage.needs_engine:
            self._import_libraries()
        drop_torn_line(self._plan.out)
        started_at = time.monotonic()
        # A rehearsal is to show that every stage ends, however slow the machine is.
        box = min(stage.seconds if self._plan.size == "full" else float("inf"), self._plan.seconds_left)
        process = self._start(stage, started_at + box)
        try:
            self._import_libraries()  # beside the first stage, which does without
            process.join(max(0.0, started_at + box + ALARM_GRACE_SECONDS - time.monotonic()))
        finally:
            _kill_group(process)
        drop_torn_line(self._plan.out)
        seconds = time.monotonic() - started_at
        return self._end_of(stage, process.exitcode, box, seconds)

    def _why_not(self, stage: Stage) -> str:
        if stage.number not in self._plan.numbers:
            return "not asked for"
        if self._plan.seconds_left < LEAST_SECONDS:
            return f"the budget of {self._plan.budget:g} s is spent"
        if stage.measures_speed and _is_nothing_right(read_records(self._plan.out)):
            return "no correctness test passed: speed is of no use"
        return ""

    def _start(self, stage: Stage, deadline: float) -> BaseProcess:
        plan = self._plan
        assignment = Assignment(stage, plan.out, plan.device, plan.size, plan.started_at, deadline, os.getpid())
        # What waits in the streams' buffers would be written by the forked child too.
        sys.stdout.flush()
        sys.stderr.flush()
        context: Any = multiprocessing.get_context(start_method())
        process: BaseProcess = context.Process(target=run_stage, args=(assignment,), name=f"stage-{stage.number}")
        process.start()
        return process

    def _import_libraries(self) -> None:
        """Import what the later stages need. An error costs those that need it, each of which names it again."""
        if not self._needs_libraries:
            return
        self._needs_libraries = False
        for name in HEAVY_IMPORTS:
            try:
                importlib.import_module(name)
            except Exception:  # noqa: BLE001 - the stages that need it fail by it
                traceback.print_exc()

    def _end_of(self, stage: Stage, code: int | None, box: float, seconds: float) -> StageEnd:
        if code == 0:
            return StageEnd("done", seconds=_line_of(stage, END, self._plan.out)["seconds"])
        if code is not None and code > 0:
            return StageEnd(
                "failed", _line_of(stage, FAILURE, self._plan.out).get("reason", f"exit code {code}"), seconds
            )
        # The alarm comes while the stage runs; a SIGKILL before that is not ours.
        if code == -signal.SIGALRM or seconds >= box:
            what = "its time box" if box == stage.seconds else "the end of the budget"
            return StageEnd("killed", f"killed at {what}, after {seconds:.0f} s", seconds)
        assert code is not None, "a killed child has its exit code"
        return StageEnd("failed", f"ended by {signal.Signals(-code).name}", seconds)


def start_method() -> str:
    """Return "fork" while that is safe, else "spawn"."""
    num_threads = len(list(Path("/proc/self/task").iterdir()))
    return "spawn" if num_threads > 1 or not _would_fork_well() else "fork"


def _would_fork_well() -> bool:
    """Return whether a forked child can open CUDA: it cannot once the driver was initialised here."""
    pid = os.fork()
    if pid == 0:
        os._exit(int(torch.cuda._is_in_bad_fork()))
    _, status = os.waitpid(pid, 0)
    return status == 0


def _is_nothing_right(records: Sequence[dict[str, Any]]) -> bool:
    """Return whether correctness tests ran and none of them passed."""
    passed = [one["passed"] for one in records if one["stage"] == CORRECTNESS and "passed" in one]
    return bool(passed) and not any(passed)


def _line_of(stage: Stage, name: str, out: Path) -> dict[str, Any]:
    """Return the child's final record of a stage, empty where it wrote none."""
    return next((one for one in read_records(out) if (one["stage"], one["name"]) == (stage.number, name)), {})


def _kill_group(process: BaseProcess) -> None:
    """Kill the stage and whatever it has started: also after its end, when only its own children can be left."""
    assert process.pid is not None, "a started process has a number"
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
