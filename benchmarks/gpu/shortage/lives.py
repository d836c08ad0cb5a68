"""The engine's own process on a tiny checkpoint: it ends with its device, and the next one goes on."""

import multiprocessing
import os
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

from benchmarks.gpu.stage import Context, Figures
from config.model import ModelSettings
from inference.process.child import main
from inference.process.child_handle import ChildHandle
from inference.process.engine_process import EngineProcess, wait_until_ready
from inference.request import GenerationRequest, GenerationResult
from tests.support.engine.asserting_child import FUSE, load_engine
from tests.support.models.tiny_models import build_tiny_sd

MODULE = "tests.support.engine.asserting_child"
NUM_PROCESSES = 2
# The processes import torch and diffusers beside the rest of the stage.
READY_SECONDS = RESULT_SECONDS = 120.0


class Lives:
    """Owner of the engine's process, and of what is asked of it.

    Starting one takes long: `begin` does not wait, and the second process starts with the first.
    """

    def __init__(self, folder: Path, context: Context) -> None:
        self._folder = folder
        # A process of a rehearsal is forked from this one: it finds everything imported. CUDA allows no forks.
        self._is_forked = context.is_tiny and not context.is_cuda
        self._forked: list[_Forked] = []
        self._children: list[ChildHandle] = []
        self._spares: list[ChildHandle] = []
        settings = ModelSettings.model_validate({"MODEL_ID": str(folder), "DEVICE": context.device.type})
        self._engine = EngineProcess(settings, log_level="WARNING", on_restart=lambda: None, spawn=self._next)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()
        for spare in self._spares:
            spare.end(is_idle=False)

    def begin(self) -> Figures:
        """Start the process and write the checkpoint. Call it before this process has threads."""
        if self._is_forked:
            self._forked = [_Forked() for _ in range(NUM_PROCESSES)]
        build_tiny_sd(self._folder)
        self._engine.start()
        return {}

    def end(self) -> Figures:
        """Fail the first process's device at the first step of a request; that one is to be drawn by the next."""
        wait_until_ready(self._engine, READY_SECONDS)
        (self._folder / FUSE).touch()
        first, again = (self._draw(name).images[0] for name in ("fuse", "again"))
        exit_code = self._children[0].process.returncode
        return {"exit_code": exit_code, "num_processes": len(self._children), "is_drawn": first.rgb == again.rgb}

    def _draw(self, request_id: str) -> GenerationResult:
        request = GenerationRequest(request_id, "a fox", "", 64, 64, 3, 5.0, (1,))
        return self._engine.generate(request, lambda _: None, lambda: False).result(RESULT_SECONDS)

    def _next(self, settings: ModelSettings) -> ChildHandle:
        """Return the process for the engine's next start. Those spawned here end with the calling thread, its owner."""
        if not self._children:
            spawned = (
                [] if self._is_forked else [ChildHandle.spawn(settings, module=MODULE) for _ in range(NUM_PROCESSES)]
            )
            self._spares = [forked.child() for forked in self._forked] + spawned
        child = self._spares.pop(0)
        self._children.append(child)
        return child


class _Forked:
    """An engine's process forked from this one, with as much of `subprocess.Popen` as `ChildHandle` uses."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair()
        context: Any = multiprocessing.get_context("fork")
        with theirs:
            self._process: BaseProcess = context.Process(target=_serve, args=(theirs.fileno(), os.getpid()))
            self._process.start()

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

    def child(self) -> ChildHandle:
        """Return a `ChildHandle` as `EngineProcess` holds it. It starts a thread: fork nothing after that."""
        process: Any = self
        return ChildHandle(process, Connection(self._ours.detach()))


def _serve(descriptor: int, parent_pid: int) -> None:
    sys.argv = [MODULE, str(descriptor), str(parent_pid)]
    main(load_engine)
