"""A server process that cannot outlive the Python process that started it."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

POLL_SECONDS = 0.05
LOG_TAIL_CHARS = 4000

# Waits for the end of its input, which comes when our end of the pipe closes: at exit, on a crash, on SIGKILL too.
LEASH = 'read -r _; kill -KILL "-$1"'


class ServerError(Exception):
    """A server did not start, stop or answer; the message ends with the tail of its log."""


class ServerProcess:
    """A command in a process group of its own, output going to a log file. Not thread-safe.

    Owns the group: `stop` and `kill` leave nothing of it, and so does the end of this Python process, however it ends.
    """

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], log: Path, cwd: Path) -> None:
        self.log = log
        with log.open("ab") as output:
            self._server = subprocess.Popen(
                command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0
            )
        self._leash = subprocess.Popen(
            ["/bin/sh", "-c", LEASH, "leash", str(self.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )

    @property
    def pid(self) -> int:
        return self._server.pid

    @property
    def exit_code(self) -> int | None:
        """None while the server runs; a negative number is the signal that ended it."""
        return self._server.poll()

    @property
    def is_running(self) -> bool:
        return self._server.poll() is None

    def stop(self, timeout_seconds: float) -> None:
        """Stop the server by SIGTERM, wait, and kill what is left of the group."""
        self._server.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._server.wait(timeout_seconds)
        self.kill()

    def kill(self) -> None:
        """End the group by SIGKILL and reap the server. Harmless where it has ended already."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._server.wait()
        self._leash.kill()
        self._leash.communicate()

    def wait_until(self, answers: Callable[[], bool], *, timeout_seconds: float) -> None:
        """Return once `answers()` is true; raise `ServerError` if the server ends or the time runs out before."""
        deadline = time.monotonic() + timeout_seconds
        while not answers():
            if not self.is_running:
                raise ServerError(f"ended with exit status {self._server.returncode}\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise ServerError(f"gave no answer within {timeout_seconds} s\n{self.log_tail()}")
            time.sleep(POLL_SECONDS)

    def log_tail(self) -> str:
        return self.log.read_text(errors="replace")[-LOG_TAIL_CHARS:]
