"""`python3 -m benchmarks.gpu --out DIR --budget 460`: every stage in turn, its figures in DIR as they are made.

A second call takes another DIR and, by `--only` or `--skip`, the stages that are to run again. The exit code is 0 where
every stage that was asked for came to its end, 1 where one did not, 2 for arguments that cannot be.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

# numpy's BLAS would start its threads when it is imported, and with threads there is no fork.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Asking torch whether there is a GPU must not open a context here.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.gpu.frame import Frame, Plan, StageEnd
from benchmarks.gpu.records import RESULTS, write_summary
from benchmarks.gpu.stages import NUMBERS, STAGES
from benchmarks.gpu.summary import describe, print_tables, summarise


def main() -> int:
    """Run what was asked for; the last line printed is JSON."""
    plan = _plan()
    description = describe()
    frame = Frame(plan)
    ends: dict[int, StageEnd] = {}
    for stage in STAGES:
        ends[stage.number] = end = frame.run(stage)
        write_summary(plan.out, summarise(plan, description, ends))
        print(f"stage {stage.number} {stage.name}: {end.state} after {end.seconds:.1f} s {end.reason}", flush=True)
    summary = summarise(plan, description, ends)
    print_tables(summary)
    is_complete = all(ends[number].state == "done" for number in plan.numbers)
    print(json.dumps(_last_line(summary, plan, is_complete=is_complete)), flush=True)
    return 0 if is_complete else 1


def _last_line(summary: dict[str, Any], plan: Plan, *, is_complete: bool) -> dict[str, Any]:
    header = {key: summary[key] for key in ("benchmark", "device", "commit", "size", "seconds")}
    stages = {
        stage["name"]: {key: stage[key] for key in ("state", "seconds", "failed_measurements")}
        for stage in summary["stages"]
    }
    return {**header, "is_complete": is_complete, "out": str(plan.out), "stages": stages}


def _plan() -> Plan:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for results.jsonl and summary.json")
    parser.add_argument("--budget", type=float, default=460, help="seconds for everything")
    parser.add_argument("--only", type=_numbers, default=NUMBERS, help="stages to run: 2,3")
    parser.add_argument("--skip", type=_numbers, default=(), help="stages to leave out: 6")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: a rehearsal of everything")
    asked = parser.parse_args()
    if (asked.out / RESULTS).exists():
        parser.error(f"--out {asked.out} holds the {RESULTS} of another run: give a new folder")
    if asked.budget <= 0:
        parser.error(f"--budget is {asked.budget}: give the seconds that there are, more than 0")
    asked.out.mkdir(parents=True, exist_ok=True)
    numbers = tuple(number for number in asked.only if number not in asked.skip)
    return Plan(asked.out.resolve(), asked.budget, asked.device, asked.size, numbers, time.monotonic())


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(one) for one in text.split(",") if one.strip().isdigit())
    if not numbers or len(numbers) < len(text.split(",")) or set(numbers) - set(NUMBERS):
        raise argparse.ArgumentTypeError(f"{text!r} names no stages: give numbers from {NUMBERS[0]} to {NUMBERS[-1]}")
    return tuple(sorted(set(numbers)))


if __name__ == "__main__":
    raise SystemExit(main())
