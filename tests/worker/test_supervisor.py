"""The end of a worker that nothing can hold up."""

import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from worker.exit_code import ExitCode

# What the process has may be used; a thread's stack is more.
WITHOUT_ROOM = """
import resource, threading
from pathlib import Path
from worker.exit_code import ExitCode
from worker.supervisor import end_process_after
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used, used))
end_process_after(3600.0, ExitCode.ENGINE)
print("went on")
"""
WITH_A_THREAD_THAT_HANGS = """
import threading
from worker.exit_code import ExitCode
from worker.supervisor import end_process_after
end_process_after(0.1, ExitCode.ENGINE)
threading.Event().wait()
"""


@pytest.mark.parametrize(
    "program", [WITHOUT_ROOM, WITH_A_THREAD_THAT_HANGS], ids=["no_thread_can_be_started", "a_hang"]
)
def test_a_worker_ends_whatever_hangs_and_whatever_is_lacking(program: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )

    assert (ended.returncode, ended.stdout) == (ExitCode.ENGINE, ""), ended.stderr
