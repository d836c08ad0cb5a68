"""One stage in a process of its own: a sticky CUDA error, an exhausted memory or a hang costs this stage alone."""

import faulthandler
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.processes import die_with_parent
from benchmarks.gpu.records import Recorder
from benchmarks.gpu.stage import Context
from benchmarks.gpu.stages import Stage

EXIT_FAILED = 1
# The lines that are the frame's own, not the stage's.
START, FAILURE, END = "start", "failure", "end"


@dataclass(frozen=True)
class Assignment:
    """What a child is started with. `started_at` and `deadline` are `time.monotonic()`, one clock for all processes."""

    stage: Stage
    out: Path
    device: str
    size: str
    started_at: float
    deadline: float
    parent_pid: int


def run_stage(assignment: Assignment) -> None:
    """Run the stage to its end and leave by `os._exit`: threads and libraries that linger keep nothing waiting."""
    os.setpgid(0, 0)  # what the stage starts is killed with it
    die_with_parent(assignment.parent_pid)
    _end_at(assignment.deadline)
    faulthandler.enable()
    recorder = Recorder(assignment.out, assignment.stage.number, assignment.started_at)
    code = 0
    started_at = time.monotonic()
    try:
        _run(assignment, recorder)
        recorder.record(END, seconds=time.monotonic() - started_at)
    except BaseException as error:  # noqa: BLE001 - the boundary of the process
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
        recorder.record(FAILURE, reason=reason, traceback=traceback.format_exc()[-4000:])
        code = EXIT_FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_at(deadline: float) -> None:
    """Have the kernel end this process at its deadline, also while the parent is busy importing."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, deadline - time.monotonic()))


def _run(assignment: Assignment, recorder: Recorder) -> None:
    started_at = time.monotonic()
    device = torch.device(assignment.device)
    torch.ones(1, device=device).sum().item()  # a CUDA context, or the reason why there is none
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    recorder.record(
        START,
        device=name,
        torch=torch.__version__,
        process=type(multiprocessing.current_process()).__name__,
        seconds_to_device=time.monotonic() - started_at,
    )
    context = Context(device, assignment.size, assignment.out, assignment.deadline, recorder.record)
    importlib.import_module(assignment.stage.module).run(context)
