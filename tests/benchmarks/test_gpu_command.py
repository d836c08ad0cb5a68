"""The command that measures everything on a GPU, rehearsed on the CPU: whatever a stage does costs that stage alone."""

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.records import RESULTS, SUMMARY, Recorder, drop_torn_line, read_records
from benchmarks.gpu.stages import NUMBERS
from tests.world import HANG_SECONDS, ROOT, eventually


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
    """The numbers of the processes with `part` in their command lines, zombies left out."""
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


def test_the_command_brings_every_stage_to_its_end_on_a_cpu(tmp_path: Path) -> None:
    process = start(*command(tmp_path / "out"))

    output, _ = process.communicate(timeout=HANG_SECONDS)

    records = read_records(tmp_path / "out")
    summary = json.loads((tmp_path / "out" / SUMMARY).read_text())
    last_line = json.loads(output.splitlines()[-1])
    errors = {(one["stage"], one["name"]): one["error"] for one in records if "error" in one}
    assert errors == {}, output
    assert process.returncode == 0, output
    assert last_line["is_complete"]
    assert {stage["number"]: stage["state"] for stage in summary["stages"]} == dict.fromkeys(NUMBERS, "done")
    names = Counter((one["stage"], one["name"]) for one in records)
    assert max(names.values()) == 1
    told = {(stage["number"], name) for stage in summary["stages"] for name in stage["figures"]}
    assert told == {key for key in names if key[1] not in ("start", "end")}
    assert {summary["device"], last_line["device"]} == {"CPU"}


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
    """How the stages of `tests.benchmarks.bad_stages` ended, and the summary of them."""
    out = tmp_path_factory.mktemp("bad")
    output, _ = start(out, module="tests.benchmarks.bad_stages").communicate(timeout=HANG_SECONDS)
    told: dict[str, Any] = json.loads(output.splitlines()[-1])
    return told | {"records": read_records(out), "output": output}


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


def test_a_measurement_that_fails_costs_itself(ended: dict[str, Any]) -> None:
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
def test_arguments_that_cannot_be_are_named(
    tmp_path: Path, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from benchmarks.gpu.__main__ import main

    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--out", str(tmp_path / "out"), *arguments])

    with pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err
