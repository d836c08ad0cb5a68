"""`darkroom demo`, ended from outside: nothing of what it started stays behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.test_parts import processes_below
from tests.support.world import eventually, shadow_modules

DARKROOM = Path(sys.executable).with_name("darkroom")


def runs(begun: list[str], names: list[str]) -> bool:
    """Return whether there is a process for each beginning of a name."""
    return all(sum(name.startswith(one) for name in names) >= begun.count(one) for one in begun)


@pytest.mark.parametrize(
    ("number", "exit_code", "begun"),
    [
        # The worker and its engine are the last that are started.
        (signal.SIGKILL, -signal.SIGKILL, ["beam", "epmd", "python", "python", "weed"]),
        # As of a terminal that is closed; SIGTERM has the same handler.
        (signal.SIGHUP, 128 + signal.SIGHUP, ["weed"]),
    ],
)
def test_demo_that_is_ended_leaves_no_process_behind(
    tmp_path: Path, number: signal.Signals, exit_code: int, begun: list[str]
) -> None:
    shadow_modules(tmp_path)
    (tmp_path / "tmp").mkdir()
    env = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path / "tmp"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"
    with log.open("wb") as sink:
        demo = subprocess.Popen([DARKROOM, "demo"], env=env, cwd=tmp_path, stdout=sink, stderr=sink)
    try:
        eventually(
            lambda: demo.poll() is not None or runs(begun, processes_below(tmp_path)),
            lambda: f"{processes_below(tmp_path)}\n{log.read_text()}",
        )
        demo.send_signal(number)
        assert demo.wait(300) == exit_code, log.read_text()
    finally:
        demo.kill()
        demo.wait()

    eventually(lambda: processes_below(tmp_path) == [], lambda: str(processes_below(tmp_path)))
    if number != signal.SIGKILL:
        assert list((tmp_path / "tmp").iterdir()) == []
