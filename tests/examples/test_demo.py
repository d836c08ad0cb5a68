"""`darkroom demo`: it draws what it promises, and ended from outside it leaves nothing behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from examples.demo.jobs import JOBS
from examples.demo.main import ENDING_SIGNALS, run_demo
from tests.examples.test_parts import processes_below
from tests.support.long import long
from tests.support.world import eventually, shadow_modules

DARKROOM = Path(sys.executable).with_name("darkroom")


@pytest.fixture
def _signals_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signals_as_before")
def test_the_demo_draws_a_job_of_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the fewest steps, and without another process's imports; the long form is as a user types it."""
    jobs = [replace(job, steps=2) for job in (*JOBS[:2], *(job for job in JOBS if job.kind))]
    assert run_demo(tmp_path / "out", jobs) == 0
    assert_drawn(tmp_path / "out", capsys.readouterr().out, len(jobs))


@long
def test_the_demo_runs_to_its_end_and_draws_what_it_promises(tmp_path: Path) -> None:
    env = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    done = subprocess.run([DARKROOM, "demo", "--out", "out"], env=env, cwd=tmp_path, capture_output=True, check=False)

    assert done.returncode == 0, done.stderr
    assert_drawn(tmp_path / "out", done.stdout.decode(), len(JOBS))


def assert_drawn(out: Path, said: str, num_jobs: int) -> None:
    assert f"{num_jobs} of {num_jobs} jobs complete" in said
    for name in ("contact-sheet.png", "timeline.png"):
        assert Image.open(out / name).width > 800


def runs(begun: list[str], names: list[str]) -> bool:
    """Return whether there is a process for each beginning of a name."""
    return all(sum(name.startswith(one) for name in names) >= begun.count(one) for one in begun)


@long
@pytest.mark.usefixtures("_signals_as_before")
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
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)  # under nohup it is ignored, and would be in the demo
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
