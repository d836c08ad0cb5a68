"""Children of an engine forked from a process that has imported what they need: up in milliseconds.

Their engine is `tests.support.engine.fake_child`'s. A child that is started as the real one is takes 0.4 s of CPU to
import the same.
"""

import multiprocessing
import os
import subprocess
import sys
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from config.model import ModelSettings
from inference.process.child import main
from inference.process.child_handle import ChildHandle
from tests.support.engine.fake_child import FakeEngine

_context: Any = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__])


class _Forked:
    """As much of `subprocess.Popen` as `ChildHandle` uses."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> None:
        """Raise `subprocess.TimeoutExpired` where it has not ended by then."""
        self._process.join(timeout)
        if timeout is not None and self._process.exitcode is None:
            raise subprocess.TimeoutExpired("engine", timeout)


def fork_fake(_settings: ModelSettings) -> ChildHandle:
    """Fork a fake child. It dies with the server that forked it, which dies with this process."""
    ours, theirs = multiprocessing.Pipe()
    process = _context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    forked: Any = _Forked(process)
    return ChildHandle(forked, ours)


def _serve(connection: "Connection[Any, Any]") -> None:
    sys.argv = [__name__, str(connection.fileno()), str(os.getppid())]
    main(FakeEngine)
