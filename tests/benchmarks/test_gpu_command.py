"""The command that measures everything on a GPU, rehearsed on the CPU: whatever a stage does costs that stage alone."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.gpu.frame import start_method
from benchmarks.gpu.records import RESULTS, SUMMARY, Recorder, drop_torn_line, read_records
from benchmarks.gpu.stages import NUMBERS
from tests.support.long import IS_LONG, long
from tests.support.paths import ROOT
from tests.support.world import HANG_SECONDS, eventually

# The short form has what needs torch alone. What the others do with an engine is in the engine's own tests, and how
# tests are recorded in test_gpu_correctness: `make gpu-rehearsal` has all stages.
REHEARSED = NUMBERS if IS_LONG else (0,)
# As far as an image in another batch may differ, in 32 bits.
SAME_DB = 42.0


def start(*arguments: object, module: str = "benchmarks.gpu") -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def command(out: Path, *more: object) -> tuple[object, ...]:
    return ("--out", out, "--device", "cpu", "--size", "tiny", "--budget", HANG_SECONDS, *more)


def processes_named(part: str) -> list[int]:
    """Return the ids of the processes with `part` in their command lines, zombies left out."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if part in (folder / "cmdline").read_text():
                found.append(int(folder.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


class Rehearsal(NamedTuple):
    """What the command left behind and printed after a run at tiny size."""

    records: list[dict[str, Any]]
    summary: dict[str, Any]
    output: str
    exit_code: int

    def figures(self, stage: int, name: str) -> dict[str, Any]:
        figures: dict[str, Any] = self.summary["stages"][stage]["figures"][name]
        return figures


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    out = tmp_path_factory.mktemp("rehearsal") / "out"
    process = start(*command(out, "--only", ",".join(map(str, REHEARSED))))
    output, _ = process.communicate(timeout=HANG_SECONDS)
    return Rehearsal(read_records(out), json.loads((out / SUMMARY).read_text()), output, process.returncode)


def test_the_command_brings_every_stage_to_its_end_on_a_cpu(rehearsal: Rehearsal) -> None:
    records, summary, output, exit_code = rehearsal
    last_line = json.loads(output.splitlines()[-1])
    errors = {(one["stage"], one["name"]): one["error"] for one in records if "error" in one}
    assert errors == {}, output
    assert exit_code == 0, output
    assert last_line["is_complete"]
    assert {stage["number"]: stage["state"] for stage in summary["stages"]} == {
        number: "done" if number in REHEARSED else "skipped" for number in NUMBERS
    }
    names = Counter((one["stage"], one["name"]) for one in records)
    assert max(names.values()) == 1
    report = {(stage["number"], name) for stage in summary["stages"] for name in stage["figures"]}
    assert report == {key for key in names if key[1] not in ("start", "end")}
    assert {summary["device"], last_line["device"]} == {"CPU"}


def test_stages_are_forked_without_importing_libraries_again(rehearsal: Rehearsal) -> None:
    started_by = {one["process"] for one in rehearsal.records if one["name"] == "start"}

    assert started_by == {"ForkProcess"}


def test_stages_are_spawned_where_a_library_has_started_a_thread() -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        assert start_method() == "spawn"
    finally:
        end.set()
        thread.join()


@long
def test_rehearsal_runs_and_passes_a_gpu_test(rehearsal: Rehearsal) -> None:
    verdict = rehearsal.figures(1, "verdict")

    assert (verdict["passed"], verdict["failed"], verdict["left_out"]) == (1, 0, 0)


@long
def test_rehearsal_short_of_memory_refuses_images_or_draws_them_right_and_draws_the_next(
    rehearsal: Rehearsal,
) -> None:
    halved = rehearsal.figures(5, "half the lanes")
    too_large, without_room = (
        rehearsal.figures(5, name) for name in ("one that never fits", "an adapter without room")
    )

    assert halved["num_right"] == 10
    # The stand-in has room for four.
    lanes_tried = sorted(map(int, halved["forwards_by_lanes"]))
    assert lanes_tried[0] <= 4 < lanes_tried[-1]
    assert too_large["code"] == without_room["code"] == "GPU_OOM"
    assert "adapter 1 of 1" in without_room["message"]
    assert min(too_large["psnr_db_of_the_next"], without_room["psnr_db_of_the_next"]) >= SAME_DB
    assert rehearsal.figures(5, "decoding in tiles")["tried_in_tiles"] == [False, True]
    waited = rehearsal.figures(5, "an adapter that waits for room")
    assert waited["began_after_steps_of_the_other"] >= waited["memory_was_back_after_steps"]


@long
def test_a_device_assert_ends_the_engine_s_process_and_the_next_one_draws(rehearsal: Rehearsal) -> None:
    figures = rehearsal.figures(5, "device assert")

    assert (figures["exit_code"], figures["num_processes"], figures["is_drawn"]) == (70, 2, True)


def test_the_lines_so_far_are_whole_when_the_command_is_killed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    seed = random.randrange(1 << 30)
    num_lines = random.Random(seed).randint(1, 25)
    process = start(*command(out, "--only", 0))

    eventually(lambda: len(read_records(out)) >= num_lines or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.wait()

    eventually(
        lambda: not processes_named(str(out)), lambda: f"left over with seed {seed}: {processes_named(str(out))}"
    )
    lines = (out / RESULTS).read_bytes().splitlines(keepends=True)
    assert len(lines) >= num_lines, f"seed {seed}"
    assert all(line.endswith(b"\n") and json.loads(line) for line in lines), f"seed {seed}"


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the stages of `tests.benchmarks.bad_stages`; return how they ended, and the summary."""
    out = tmp_path_factory.mktemp("bad")
    output, _ = start(out, module="tests.benchmarks.bad_stages").communicate(timeout=HANG_SECONDS)
    report: dict[str, Any] = json.loads(output.splitlines()[-1])
    return report | {"records": read_records(out), "output": output}


def test_a_stage_that_raises_fails_with_its_reason_and_keeps_its_figures(ended: dict[str, Any]) -> None:
    assert ended["ends"]["0"]["state"] == "failed"
    assert ended["ends"]["0"]["reason"] == "ValueError: the stage is wrong"
    assert ended["summary"]["stages"][0]["figures"]["before it"]["value"] == "inf"


def test_speed_is_not_measured_where_no_correctness_test_passes(ended: dict[str, Any]) -> None:
    assert ended["ends"]["1"]["state"] == "done"
    assert ended["ends"]["2"] == {
        "state": "skipped",
        "reason": "no correctness test passed: speed is of no use",
        "seconds": 0.0,
    }


def test_a_stage_that_hangs_is_killed_at_its_box_with_all_it_started(ended: dict[str, Any]) -> None:
    (started,) = (one["pid"] for one in ended["records"] if one["name"] == "its process")

    assert ended["ends"]["3"]["state"] == "killed"
    assert "its time box" in ended["ends"]["3"]["reason"]
    eventually(lambda: not is_running(started))


def test_a_stage_killed_in_the_middle_of_a_line_leaves_whole_lines(ended: dict[str, Any]) -> None:
    assert ended["ends"]["4"]["reason"] == "ended by SIGKILL"
    assert [one["stage"] for one in ended["records"]] == [0, 0, 0, 1, 1, 1, 1, 3, 3, 4, 5, 5, 5, 5, 5, 5]


def test_failed_measurement_leaves_the_others(ended: dict[str, Any]) -> None:
    figures = ended["summary"]["stages"][5]["figures"]

    assert ended["ends"]["5"]["state"] == "done"
    assert ended["summary"]["stages"][5]["reason"] == "failed measurements: 1"
    assert figures["lost"]["error"] == "RuntimeError: no figure"
    assert figures["on a GPU alone"] == {"skipped": "needs CUDA"}
    assert (figures["first"]["value"], figures["last"]["value"]) == (1, 3)


def test_a_stage_cannot_record_two_figures_under_one_name(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 2, started_at=0.0)
    recorder.record("copy", seconds=1.0)

    with pytest.raises(ValueError, match="has recorded 'copy' before"):
        recorder.record("copy", seconds=2.0)


def test_a_torn_line_is_cut_off_and_whole_ones_stay(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 2, started_at=0.0)
    recorder.record("copy", seconds=1.0)
    whole = (tmp_path / RESULTS).read_bytes()
    (tmp_path / RESULTS).write_bytes(whole + b'{"stage": 2, "na')

    drop_torn_line(tmp_path)

    assert (tmp_path / RESULTS).read_bytes() == whole


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--only", "7"], "'7' names no stages: give numbers from 0 to 6"),
        (["--skip", "1,x"], "'1,x' names no stages"),
        (["--budget", "0"], "give the seconds that there are, more than 0"),
    ],
)
def test_impossible_arguments_are_refused_by_name(
    tmp_path: Path, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from benchmarks.gpu.__main__ import main

    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--out", str(tmp_path / "out"), *arguments])

    with pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err
