"""Take the steps of a machine; what is done is not done again."""

import json
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO

from tests.matrix.machines import INSTALL, Machine
from tests.matrix.places import Place

STEP_SECONDS = 3600.0
MADE = "root"
COUNTS = re.compile(r"^=* ?((?:\d+ \w+(?:, )?)+) in [\d.]+s", re.MULTILINE)
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class StepResult:
    """How a step ended, what pytest counted in it, and which tests failed."""

    name: str
    is_done: bool
    seconds: float
    counts: str
    failed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MachineResult:
    """The row of a machine: the versions of what is tried there, and its steps as far as they were taken."""

    machine: str
    python: str
    rabbitmq: str
    steps: tuple[StepResult, ...]

    @property
    def is_done(self) -> bool:
        return all(step.is_done for step in self.steps)


class MachineRun:
    """The steps of a machine at their place, a log and a result of each below `folder`."""

    def __init__(self, machine: Machine, place: Place, folder: Path, say: Callable[[str], None]) -> None:
        self._machine, self._place, self._folder, self._say = machine, place, folder, say
        self._is_fresh = False

    def take_steps(self) -> MachineResult:
        """Take every step that is not done yet. Without a place and an environment in it none else is tried."""
        steps = [self._once(MADE, lambda log: self._place.make(lambda command: _run(command, log)))]
        for step in self._machine.steps:
            if not all(taken.is_done for taken in steps if taken.name in (MADE, INSTALL.name)):
                return MachineResult(self._machine.name, "", "", tuple(steps))
            steps.append(self._once(step.name, partial(self._take, step.command)))
        return MachineResult(self._machine.name, *self._versions(), tuple(steps))

    def _take(self, line: str, log: IO[str]) -> None:
        if not self._is_fresh:
            self._place.refresh()
            self._is_fresh = True
        _run(self._place.command(line), log)

    def _once(self, name: str, act: Callable[[IO[str]], None]) -> StepResult:
        kept, log_file = self._folder / f"{name}.json", self._folder / f"{name}.log"
        if kept.exists() and (result := StepResult(**json.loads(kept.read_text()))).is_done:
            return result
        self._say(f"{self._machine.name}: {name}, {log_file}")
        began_at = time.monotonic()
        with log_file.open("w") as log:
            try:
                act(log)
                is_done = True
            except subprocess.CalledProcessError as error:
                print(f"exit code {error.returncode}", file=log)
                is_done = False
            except (subprocess.TimeoutExpired, OSError, ValueError) as error:
                print(f"{type(error).__name__}: {error}", file=log)
                is_done = False
        text = log_file.read_text(errors="replace")
        counts = "".join(COUNTS.findall(text)[-1:])
        failed = tuple(dict.fromkeys(FAILED.findall(text)))
        result = StepResult(name, is_done, round(time.monotonic() - began_at, 1), counts, failed)
        kept.write_text(json.dumps(asdict(result)))
        return result

    def _versions(self) -> tuple[str, str]:
        """Ask for the versions of Python and RabbitMQ, once for all."""
        kept = self._folder / "versions.json"
        if not kept.exists():
            kept.write_text(json.dumps([_said(self._place.ask_python()), _said(self._place.ask_rabbitmq())]))
        python, rabbitmq = json.loads(kept.read_text())
        return python, rabbitmq


def _run(command: Sequence[str], log: IO[str]) -> None:
    log.flush()
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=STEP_SECONDS, check=True)


def _said(command: Sequence[str]) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
