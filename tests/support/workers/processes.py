"""Start workers' processes; those without torch by forking one that has imported everything.

A worker spends a second of CPU on imports, and the tests start a hundred of them. In the long form and under coverage
each is a process from scratch, as in the field, and otherwise the first of each test process.
"""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from tests.support.long import IS_LONG

TEMPLATE = Path(__file__).with_name("template.py")
# They decide what a worker's modules are: see tests/faults/site.
KEY_NAMES = ("PYTHONPATH", "FAULTS_CONSTANTS", "FAULTS_CLOCK")

MAX_TEMPLATES = 4  # each keeps 70 MB

_num_started = count()
_templates: dict[tuple[str, ...], "_Template"] = {}


class Process(Protocol):
    """What the tests use of `subprocess.Popen`."""

    pid: int
    returncode: Any

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...
    def kill(self) -> None: ...


def start_process(env: dict[str, str], log: Path, *arguments: str) -> Process:
    """Start `darkroom` with these arguments in the log's folder, both of its outputs in the log."""
    log.write_bytes(b"")
    key = tuple(env.get(name, "") for name in KEY_NAMES)
    is_from_scratch = IS_LONG or "FAULTS_HOLD" in env or any(name.startswith("COVERAGE_") for name in env)
    if "FAULTS_STAND_IN" in env and not is_from_scratch and next(_num_started) > 0:
        if key not in _templates:
            _make_room()
            _templates[key] = _Template(env)
        return _templates[key].fork(env, log, arguments)
    command = [str(Path(sys.executable).parent / "darkroom"), *arguments]
    with log.open("ab") as sink:
        return subprocess.Popen(command, env=env, cwd=log.parent, stdout=sink, stderr=sink)


def _make_room() -> None:
    """End the templates of the longest standing without a living worker, but for a few."""
    idle = [key for key, template in _templates.items() if not template.has_living_workers()]
    for key in idle[: max(0, len(_templates) + 1 - MAX_TEMPLATES)]:
        _templates.pop(key).close()


class _Template:
    """Owner of a template's process and of what it tells."""

    def __init__(self, env: dict[str, str]) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([sys.executable, "-P", TEMPLATE], env=env, stdin=pipe, stdout=pipe)
        atexit.register(self.close)
        self._lock = threading.Lock()
        self._is_closed = False
        self._heard = b""
        self._started: list[int] = []
        self._pids: set[int] = set()
        self._codes: dict[int, int] = {}

    def fork(self, env: dict[str, str], log: Path, arguments: tuple[str, ...]) -> "_Forked":
        order = {"arguments": arguments, "env": env, "folder": str(log.parent), "log": str(log)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        while not self._started:
            self.listen(1.0)
        return _Forked(self, self._started.pop())

    def has_living_workers(self) -> bool:
        self.listen(0.0)
        return not self._pids <= self._codes.keys()

    def close(self) -> None:
        """End the process; workers that it has forked go on."""
        self._is_closed = True
        self._process.kill()
        self._process.wait()

    def listen(self, seconds: float) -> None:
        """Take in what it tells within that time, or has told."""
        assert self._process.stdout is not None
        with self._lock:
            if not select.select([self._process.stdout], [], [], seconds)[0]:
                return
            heard = os.read(self._process.stdout.fileno(), 4096)
            assert heard or self._is_closed, "the template of the workers has ended"
            *lines, self._heard = (self._heard + heard).split(b"\n")
            for told in map(json.loads, lines):
                if "started" in told:
                    self._codes.pop(told["started"], None)  # of one before that had the same id
                    self._started.append(told["started"])
                    self._pids.add(told["started"])
                else:
                    self._codes[told["ended"]] = told["code"]

    def code_of(self, pid: int) -> int | None:
        self.listen(0.0)
        return self._codes.get(pid)


class _Forked:
    """A forked worker."""

    def __init__(self, template: _Template, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._template = template

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._template.code_of(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("darkroom", timeout or 0.0)
            self._template.listen(0.1)
        return code

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
