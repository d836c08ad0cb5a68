"""`make matrix`: the demo, all tests, and those of the broker in their long form, on the machines that people have.

As root. Each step leaves its log and its result below the folder; what is done there is not done again. Prints a table
for people and, last, a line of JSON; exit code 1 where a step failed.
"""

import argparse
import dataclasses
import json
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.matrix.machines import MACHINES, OF_A_BROKER, PYTHON312, UBUNTU, WHOLE, Machine
from tests.matrix.places import place_of
from tests.matrix.roots import is_reached
from tests.matrix.running import MADE, MachineResult, MachineRun, StepResult


def main() -> int:
    """Run what was asked for."""
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))  # what runs in a root must not outlive us
    arguments = read_arguments()
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    results = [
        take_steps(machine, arguments.out.resolve() / machine.name, console, is_fresh=arguments.fresh)
        for machine in chosen(arguments.machines, console)
    ]
    console.print(render(results))
    print(json.dumps({"matrix": [dataclasses.asdict(result) for result in results]}))
    return 0 if all(result.is_done for result in results) else 1


def chosen(names: Sequence[str], console: Console) -> list[Machine]:
    """Choose the machines by name, else all; Ubuntu's Python alone where its archive is not reached."""
    machines = [machine for machine in (*MACHINES, PYTHON312) if machine.name in names] or list(MACHINES)
    for index, machine in enumerate(machines):
        if machine.mirror == UBUNTU and not is_reached(machine):
            console.print(f"{UBUNTU} is not reached (UBUNTU_MIRROR): {PYTHON312.name} instead of {machine.name}")
            machines[index] = PYTHON312
    return machines


def take_steps(machine: Machine, folder: Path, console: Console, *, is_fresh: bool) -> MachineResult:
    """Take the machine's steps, or the rest of them, below the folder."""
    if is_fresh:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    run = MachineRun(machine, place_of(machine, folder), folder, lambda line: console.print(line, soft_wrap=True))
    return run.take_steps()


def render(results: Sequence[MachineResult]) -> Table:
    """Draw a row for each machine and a column for each step."""
    columns = dict.fromkeys((MADE, *(step.name for step in (*WHOLE, *OF_A_BROKER))))
    table = Table("machine", "Python", "RabbitMQ", *columns)
    for result in results:
        steps = {step.name: step for step in result.steps}
        cells = (cell(steps[name]) if name in steps else "-" for name in columns)
        table.add_row(result.machine, result.python, result.rabbitmq, *cells)
    return table


def cell(step: StepResult) -> str:
    """Say how a step ended, in how long."""
    ended = step.counts or ("done" if step.is_done else "failed")
    return f"{ended}, {step.seconds / 60:.1f} min"


def read_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; without `given`, that of this process."""
    names = [machine.name for machine in (*MACHINES, PYTHON312)]
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    # argparse of Python 3.11 would compare no name at all with the choices of `nargs="*"`, and refuse it.
    parser.add_argument(
        "machines", nargs="*", metavar="MACHINE", help=f"of {', '.join(names)}; default: all but the last"
    )
    parser.add_argument("--fresh", action="store_true", help="make and run everything anew")
    parser.add_argument("--out", type=Path, default=Path("out/matrix"))
    arguments = parser.parse_args(given)
    if unknown := set(arguments.machines) - set(names):
        parser.error(f"no machine is named {' or '.join(sorted(unknown))}: choose from {', '.join(names)}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
