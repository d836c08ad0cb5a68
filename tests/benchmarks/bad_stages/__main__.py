"""Run them all in the frame: `python -m tests.benchmarks.bad_stages DIR`. The last line is how they ended, as JSON."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.gpu.frame import Frame, Plan
from benchmarks.gpu.stages import Stage
from benchmarks.gpu.summary import summarise

LONG_SECONDS, BOX_SECONDS = 280.0, 2.0


def stage(number: int, name: str, seconds: float = LONG_SECONDS, *, measures_speed: bool = False) -> Stage:
    module = f"tests.benchmarks.bad_stages.{name}"
    return Stage(number, name, seconds, module, needs_engine=False, measures_speed=measures_speed)


STAGES = (
    stage(0, "raises"),
    stage(1, "passes_no_test"),
    stage(2, "hangs", measures_speed=True),
    stage(3, "hangs", BOX_SECONDS),
    stage(4, "is_killed"),
    stage(5, "loses_a_measurement"),
)


def main() -> None:
    numbers = tuple(one.number for one in STAGES)
    plan = Plan(Path(sys.argv[1]), LONG_SECONDS, "cpu", "full", numbers, time.monotonic())
    frame = Frame(plan, STAGES)
    ends = {one.number: frame.run(one) for one in STAGES}
    report = {"ends": {number: asdict(end) for number, end in ends.items()}, "summary": summarise(plan, {}, ends)}
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
